//! The archive that the guest kernel unpacks as its first file system: "newc" format, written so that the same
//! content always gives the same bytes.

use std::fmt::Write;

/// Bytes of a header and of the padding after each name and content.
const ALIGN: usize = 4;

/// What an archive holds.
pub(crate) enum Entry<'a> {
    /// A folder.
    Folder { name: &'a str },
    /// A program.
    Program { name: &'a str, content: &'a [u8] },
    /// A character device.
    Device { name: &'a str, major: u32, minor: u32 },
}

/// Writes an archive. Everything belongs to root and is dated 1970.
pub(crate) fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let inode = u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1);
        match entry {
            Entry::Folder { name } => append(&mut bytes, inode, name, 0o040_755, (0, 0), &[]),
            Entry::Program { name, content } => append(&mut bytes, inode, name, 0o100_755, (0, 0), content),
            Entry::Device { name, major, minor } => {
                append(&mut bytes, inode, name, 0o020_600, (*major, *minor), &[]);
            }
        }
    }
    append(&mut bytes, 0, "TRAILER!!!", 0, (0, 0), &[]);
    bytes
}

fn append(bytes: &mut Vec<u8>, inode: u32, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    // inode, mode, uid, gid, links, time, size, major, minor of the file's device, of the device itself, name, check
    let fields =
        [inode, mode, 0, 0, 1, 0, length(content.len()), 0, 0, device.0, device.1, length(name.len() + 1), 0];
    let mut header = String::from("070701");
    for field in fields {
        // Writing to a string cannot fail.
        let _ = write!(header, "{field:08X}");
    }
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(content);
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_contents_are_aligned_and_sized() {
        let bytes = archive(&[
            Entry::Folder { name: "dev" },
            Entry::Device { name: "dev/console", major: 5, minor: 1 },
            Entry::Program { name: "init", content: b"12345" },
        ]);
        assert_eq!(bytes.len() % ALIGN, 0);
        // Header of 110 bytes and a name of 4: the next header is at 116 after padding.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[116..122], b"070701");
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains("12345\x00\x00\x00070701"), "content is padded to four bytes");
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
