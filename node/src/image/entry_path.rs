//! The name of a layer's entry, parsed once into components that cannot lead out of the root.
//!
//! A name is bytes. A leading `/` means the image's root, `.` and empty components mean nothing, `..` is
//! refused wherever it stands. What is left is bounded in length and depth.

use super::error::LayerError;

/// A whole path in bytes, at most; leaves room for the staging folder below the kernel's 4096.
pub(crate) const PATH_BYTES_MAX: usize = 3072;
/// Components of a path, at most.
pub(crate) const PATH_DEPTH_MAX: usize = 128;
/// One component in bytes, at most: the limit of Linux file systems.
const COMPONENT_BYTES_MAX: usize = 255;

/// What an entry's name asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryName {
    /// The root directory itself.
    Root,
    /// A file, directory or link.
    Path(EntryPath),
    /// `.wh.NAME`: remove what earlier layers have at this path.
    Whiteout(EntryPath),
    /// `.wh..wh..opq`: empty this directory (none: the root) of what earlier layers have in it.
    Opaque(Option<EntryPath>),
    /// Bookkeeping of AUFS that means nothing outside it.
    Ignored,
}

/// A relative path of at least one component, none of which is `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct EntryPath {
    bytes: Vec<u8>,
}

impl EntryPath {
    /// Joined by `/`, without one in front or behind.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The path of the directory that holds it, empty for the root.
    pub(crate) fn parent(&self) -> &[u8] {
        self.bytes.iter().rposition(|&byte| byte == b'/').map_or(&[], |slash| &self.bytes[..slash])
    }

    /// The last component.
    pub(crate) fn name(&self) -> &[u8] {
        let start = self.bytes.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        &self.bytes[start..]
    }

    pub(crate) fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.split(|&byte| byte == b'/')
    }

    /// For messages.
    pub(crate) fn display(&self) -> String {
        printable(&self.bytes)
    }
}

/// Bytes of an archive as text for a message, cut to a length that fits a log line.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned()
}

/// Parses a name; none is the root.
pub(crate) fn parse_path(name: &[u8]) -> Result<Option<EntryPath>, LayerError> {
    let refuse = |reason| Err(LayerError::Path { path: printable(name), reason });
    let mut bytes = Vec::with_capacity(name.len().min(PATH_BYTES_MAX));
    let mut depth = 0;
    for component in name.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return refuse("it has a component '..'"),
            _ if component.contains(&0) => return refuse("it has a NUL byte"),
            _ if component.len() > COMPONENT_BYTES_MAX => return refuse("a component is too long"),
            _ => {}
        }
        if depth > 0 {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(component);
        depth += 1;
        if depth > PATH_DEPTH_MAX || bytes.len() > PATH_BYTES_MAX {
            return refuse("it is too long or too deep");
        }
    }
    Ok((depth > 0).then_some(EntryPath { bytes }))
}

/// Parses an entry's name, whiteouts included.
pub(crate) fn parse_name(name: &[u8]) -> Result<EntryName, LayerError> {
    let Some(path) = parse_path(name)? else { return Ok(EntryName::Root) };
    let refuse = |reason| Err(LayerError::Path { path: printable(name), reason });
    match path.name() {
        b".wh..wh..opq" => Ok(EntryName::Opaque(parse_path(path.parent())?)),
        last if last.starts_with(b".wh..wh.") => Ok(EntryName::Ignored),
        last => match last.strip_prefix(b".wh.") {
            None => Ok(EntryName::Path(path)),
            Some(b"" | b"." | b"..") => refuse("it is a whiteout of no file"),
            Some(hidden) => match parse_path(&[path.parent(), hidden].join(&b'/'))? {
                Some(hidden) => Ok(EntryName::Whiteout(hidden)),
                None => refuse("it is a whiteout of no file"),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(text: &str) -> EntryPath {
        EntryPath { bytes: text.into() }
    }

    #[test]
    fn names_are_told_apart() {
        for (name, expected) in [
            ("", EntryName::Root),
            ("./", EntryName::Root),
            ("/", EntryName::Root),
            ("a", EntryName::Path(path("a"))),
            ("./a//b/./c/", EntryName::Path(path("a/b/c"))),
            ("/etc/passwd", EntryName::Path(path("etc/passwd"))),
            ("...", EntryName::Path(path("..."))),
            (".wh.a", EntryName::Whiteout(path("a"))),
            ("d/.wh.a", EntryName::Whiteout(path("d/a"))),
            (".wh..wh..opq", EntryName::Opaque(None)),
            ("d/e/.wh..wh..opq", EntryName::Opaque(Some(path("d/e")))),
            (".wh..wh.plnk/x", EntryName::Path(path(".wh..wh.plnk/x"))),
            ("d/.wh..wh.aufs", EntryName::Ignored),
            ("d/.wh....", EntryName::Whiteout(path("d/..."))),
        ] {
            assert_eq!(parse_name(name.as_bytes()).unwrap(), expected, "{name:?}");
        }
    }

    #[test]
    fn names_that_lead_outside_are_refused() {
        let long = "a/".repeat(PATH_DEPTH_MAX + 1);
        let wide = "a".repeat(COMPONENT_BYTES_MAX + 1);
        for name in
            ["..", "../a", "a/..", "a/../../b", "/..", ".wh...", "a/.wh..", "a/.wh.", "a\0b", &long, &wide]
        {
            assert!(parse_name(name.as_bytes()).is_err(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_inside(name in "[a./\\x00wh]{0,40}") {
            let checked = match parse_name(name.as_bytes()) {
                Ok(EntryName::Path(path) | EntryName::Whiteout(path) | EntryName::Opaque(Some(path))) => path,
                _ => return Ok(()),
            };
            for component in checked.components() {
                prop_assert!(!matches!(component, b"" | b"." | b".."));
                prop_assert!(!component.contains(&0));
            }
        }
    }
}
