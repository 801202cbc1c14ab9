//! A tar stream's entries, in order, with every length bounded before anything is allocated for it.
//!
//! Headers are decoded by the `tar` crate. Its own iterator is not used: it reads the long names and extended
//! headers of a hostile archive into memory whole, whatever their size, and splits binary attributes at line
//! feeds. This module never touches the file system and never interprets a name.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::error::LayerError;

/// One tar block.
const BLOCK_BYTES: usize = 512;
/// A name or link target, at most.
const NAME_BYTES_MAX: u64 = 4096;
/// One entry's extended header, at most.
const EXTENDED_BYTES_MAX: u64 = 1 << 20;
/// Metadata headers before one entry, at most.
const EXTENDED_HEADERS_MAX: usize = 16;
/// What a pax record for an extended attribute begins with.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// One file, directory or link of the archive; a file's content is then read from the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarEntry {
    pub(crate) path: Vec<u8>,
    /// Target of a symbolic or hard link, else empty.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryType,
    /// Permission bits, with set-id and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch.
    pub(crate) mtime: i64,
    /// Bytes of content.
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What pax and GNU headers say about the entry that follows.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries; as [`Read`] it yields the content of the entry that was returned last.
pub(crate) struct TarStream<R> {
    inner: R,
    /// Content of the current entry that nobody has read yet.
    content_left: u64,
    /// Zero bytes between that content and the next header.
    padding: u64,
}

impl<R: Read> TarStream<R> {
    pub(crate) fn new(inner: R) -> TarStream<R> {
        TarStream { inner, content_left: 0, padding: 0 }
    }

    /// The next entry, or none at the archive's end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<TarEntry>, LayerError> {
        let mut extended = Extended::default();
        for _ in 0..EXTENDED_HEADERS_MAX {
            self.skip(self.content_left + self.padding)?;
            (self.content_left, self.padding) = (0, 0);
            let Some(block) = self.header_block()? else { return Ok(None) };
            let header = Header::from_byte_slice(&block);
            check_checksum(header)?;
            let size = header.entry_size().map_err(|_| tar_error("a size is no number"))?;
            match header.entry_type() {
                EntryType::XGlobalHeader => self.begin_content(size)?,
                EntryType::XHeader => parse_pax(&self.metadata(size, EXTENDED_BYTES_MAX)?, &mut extended)?,
                EntryType::GNULongName => extended.path = Some(self.long_name(size)?),
                EntryType::GNULongLink => extended.link = Some(self.long_name(size)?),
                _ => return self.entry(header, size, extended).map(Some),
            }
        }
        Err(tar_error("an entry has too many extended headers"))
    }

    /// Reads what is left behind the archive's end, so that whoever digests the stream sees all of it.
    pub(crate) fn drain(mut self) -> Result<(), LayerError> {
        io::copy(&mut self.inner, &mut io::sink()).map(drop).map_err(LayerError::Read)
    }

    fn entry(&mut self, header: &Header, size: u64, extended: Extended) -> Result<TarEntry, LayerError> {
        let fields = header.as_old();
        let number = |value: Option<u64>, decoded: io::Result<u64>, field: &[u8]| match value {
            Some(value) => Ok(value),
            // Some writers leave out what is zero.
            None if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
            None => decoded.map_err(|_| tar_error("a number is malformed")),
        };
        let id = |value: u64| u32::try_from(value).map_err(|_| tar_error("a number is out of range"));
        let kind = header.entry_type();
        let path = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = match extended.link {
            Some(link) => link,
            None => header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default(),
        };
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => i64::try_from(number(None, header.mtime(), &fields.mtime)?).unwrap_or(0),
        };
        // Only files have content; some writers put a size on links and directories that means nothing.
        let has_content = matches!(kind, EntryType::Regular | EntryType::Continuous);
        let size = if has_content { extended.size.unwrap_or(size) } else { size };
        let entry = TarEntry {
            path,
            link,
            kind,
            mode: id(number(None, header.mode().map(u64::from), &fields.mode)?)? & 0o7777,
            uid: id(number(extended.uid, header.uid(), &fields.uid)?)?,
            gid: id(number(extended.gid, header.gid(), &fields.gid)?)?,
            mtime,
            size: if has_content { size } else { 0 },
            xattrs: extended.xattrs,
        };
        if matches!(kind, EntryType::Link | EntryType::Symlink | EntryType::Directory | EntryType::Fifo) {
            self.begin_content(0)?;
        } else {
            self.begin_content(size)?;
        }
        Ok(entry)
    }

    fn begin_content(&mut self, size: u64) -> Result<(), LayerError> {
        let block = BLOCK_BYTES as u64;
        // Beyond any limit, and near where the sum with the padding would overflow.
        if size > 1 << 62 {
            return Err(tar_error("a size is out of range"));
        }
        self.content_left = size;
        self.padding = (block - size % block) % block;
        Ok(())
    }

    fn header_block(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, LayerError> {
        let mut block = [0; BLOCK_BYTES];
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match self.inner.read(&mut block[filled..]) {
                // Some writers leave the two closing blocks out; the layer's digest tells that from a cut.
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(LayerError::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        Ok(block.iter().any(|&byte| byte != 0).then_some(block))
    }

    fn metadata(&mut self, size: u64, bytes_max: u64) -> Result<Vec<u8>, LayerError> {
        if size > bytes_max {
            return Err(tar_error("an extended header is too long"));
        }
        self.begin_content(size)?;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(LayerError::Read)?;
        Ok(bytes)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        let mut name = self.metadata(size, NAME_BYTES_MAX + 1)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), LayerError> {
        let skipped =
            io::copy(&mut (&mut self.inner).take(bytes), &mut io::sink()).map_err(LayerError::Read)?;
        if skipped < bytes { Err(LayerError::Read(io::ErrorKind::UnexpectedEof.into())) } else { Ok(()) }
    }
}

impl<R: Read> Read for TarStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.content_left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let bytes = self.inner.read(&mut buffer[..wanted])?;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.content_left -= bytes as u64;
        Ok(bytes)
    }
}

fn tar_error(reason: &'static str) -> LayerError {
    LayerError::Tar { reason }
}

/// The sum of a header's bytes, its own field counted as blanks.
fn check_checksum(header: &Header) -> Result<(), LayerError> {
    let bytes = header.as_bytes();
    let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|&byte| u32::from(byte)).sum::<u32>()
        + 8 * u32::from(b' ');
    match header.cksum() {
        Ok(expected) if expected == sum => Ok(()),
        _ => Err(tar_error("a header's checksum is wrong")),
    }
}

/// Records of the form `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record and VALUE may hold anything.
fn parse_pax(mut rest: &[u8], extended: &mut Extended) -> Result<(), LayerError> {
    let malformed = || tar_error("an extended header is malformed");
    while !rest.is_empty() {
        let blank = rest.iter().take(8).position(|&byte| byte == b' ').ok_or_else(malformed)?;
        let length: usize = decimal(&rest[..blank]).ok_or_else(malformed)?;
        if length <= blank + 2 || length > rest.len() || rest[length - 1] != b'\n' {
            return Err(malformed());
        }
        let record = &rest[blank + 1..length - 1];
        rest = &rest[length..];
        let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(malformed)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" => extended.path = Some(value.to_vec()),
            b"linkpath" => extended.link = Some(value.to_vec()),
            b"size" => extended.size = Some(decimal(value).ok_or_else(malformed)?),
            b"uid" => extended.uid = Some(decimal(value).ok_or_else(malformed)?),
            b"gid" => extended.gid = Some(decimal(value).ok_or_else(malformed)?),
            b"mtime" => extended.mtime = Some(whole_seconds(value).ok_or_else(malformed)?),
            _ if key.starts_with(b"GNU.sparse.") => return Err(tar_error("a file is stored sparse")),
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    extended.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

fn decimal<N: std::str::FromStr>(digits: &[u8]) -> Option<N> {
    let all_digits = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| all_digits)?.parse().ok()
}

/// `-1.5` is one and a half seconds before the epoch: its whole second is the one below.
fn whole_seconds(text: &[u8]) -> Option<i64> {
    let (digits, negative) = match text.strip_prefix(b"-") {
        Some(digits) => (digits, true),
        None => (text, false),
    };
    let (whole, fraction) = match digits.iter().position(|&byte| byte == b'.') {
        Some(point) => (&digits[..point], &digits[point + 1..]),
        None => (digits, &digits[..0]),
    };
    let seconds: i64 = decimal(whole)?;
    let has_fraction = fraction.iter().any(|&byte| byte != b'0');
    Some(if negative { -seconds - i64::from(has_fraction) } else { seconds })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body;
        while body + length.to_string().len() != length {
            length = body + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn binary_attribute_with_line_feeds_survives() {
        let value = b"\x01\n5 a=b\n\x00\n";
        let records = [pax_record("SCHILY.xattr.security.capability", value), pax_record("mtime", b"-1.25")];
        let mut extended = Extended::default();
        parse_pax(&records.concat(), &mut extended).unwrap();
        assert_eq!(extended.xattrs, [(b"security.capability".to_vec(), value.to_vec())]);
        assert_eq!(extended.mtime, Some(-2));
    }

    #[test]
    fn oversized_metadata_is_refused_before_it_is_read() {
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(1 << 40);
            header.set_cksum();
            let mut stream = TarStream::new(header.as_bytes().chain(io::repeat(b'a')));
            assert!(matches!(stream.next_entry(), Err(LayerError::Tar { .. })), "{kind:?}");
        }
    }

    #[test]
    fn endless_metadata_headers_are_refused() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::XGlobalHeader);
        header.set_size(0);
        header.set_cksum();
        let archive = header.as_bytes().repeat(EXTENDED_HEADERS_MAX + 1);
        assert!(matches!(TarStream::new(&archive[..]).next_entry(), Err(LayerError::Tar { .. })));
    }

    #[test]
    fn a_cut_anywhere_inside_an_entry_is_noticed() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(700);
        header.set_mode(0o644);
        builder.append_data(&mut header, "file", &[7; 700][..]).unwrap();
        let archive = builder.into_inner().unwrap();
        for cut in 1..512 + 1024 {
            let mut stream = TarStream::new(&archive[..cut]);
            let outcome = stream.next_entry().and_then(|_| stream.next_entry());
            assert!(outcome.is_err(), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let mut stream = TarStream::new(&bytes[..]);
            while let Ok(Some(_)) = stream.next_entry() {}
            let _ = parse_pax(&bytes, &mut Extended::default());
        }

        #[test]
        fn long_names_and_content_survive(
            name in "[a-z]{1,40}(/[a-z]{1,60}){0,8}",
            content in proptest::collection::vec(any::<u8>(), 0..1500),
        ) {
            let mut builder = tar::Builder::new(Vec::new());
            let mut header = Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o4755);
            builder.append_data(&mut header, &name, &content[..]).unwrap();
            let archive = builder.into_inner().unwrap();
            let mut stream = TarStream::new(&archive[..]);
            let entry = stream.next_entry().unwrap().unwrap();
            prop_assert_eq!(entry.path, name.into_bytes());
            prop_assert_eq!(entry.mode, 0o4755);
            let mut read = Vec::new();
            stream.read_to_end(&mut read).unwrap();
            prop_assert_eq!(read, content);
            prop_assert!(stream.next_entry().unwrap().is_none());
        }
    }
}
