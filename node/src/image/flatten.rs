//! Applies an image's layers, one after the other, to a folder that only this process can reach.
//!
//! A layer is hostile until it is applied. Every path is opened beneath the root's own handle with
//! `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`, so that no name and no link, whatever order they come in,
//! is ever followed out of it. Nothing is run, no device node is made, and bytes, entries and names are
//! counted against limits before they are spent. I14: a bad layer is answered with an error.
//!
//! Whiteouts act on earlier layers only, as the image specification says: each layer's own paths are
//! remembered while it is applied. An earlier layer's symbolic link in the place of a directory gives way to
//! a real directory, as it would under overlayfs; one of the same layer is refused.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use tar::EntryType;

use super::Limits;
use super::entry_path::{EntryName, EntryPath, parse_name, parse_path, printable};
use super::error::{LayerError, RootError};
use super::layer_tar::{TarEntry, TarStream};
use super::user::{ACCOUNT_FILE_BYTES_MAX, Accounts};

/// How files are copied.
const COPY_BUFFER_BYTES: usize = 256 * 1024;
/// A symbolic link's target, at most: the kernel's own limit.
const LINK_BYTES_MAX: usize = 4095;
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const NEW_FILE: OFlags =
    OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);

/// What may still be unpacked.
struct Budget {
    limits: Limits,
    bytes: u64,
    entries: u64,
    name_bytes: u64,
}

impl Budget {
    fn spend(left: &mut u64, amount: u64, what: &'static str, max: u64) -> Result<(), LayerError> {
        *left = left.checked_sub(amount).ok_or(LayerError::TooLarge { what, max })?;
        Ok(())
    }

    fn entry(&mut self, name_bytes: usize) -> Result<(), LayerError> {
        let Limits { entries_max, name_bytes_max, .. } = self.limits;
        Budget::spend(&mut self.entries, 1, "entries", entries_max)?;
        Budget::spend(&mut self.name_bytes, name_bytes as u64, "bytes of names", name_bytes_max)
    }
}

/// The image's root while it is made.
pub(crate) struct RootTree {
    root: OwnedFd,
    budget: Budget,
    /// Every directory's time, set at the end: unpacking into a directory changes it.
    directory_times: HashMap<Vec<u8>, i64>,
    /// Paths that the layer under way has made itself.
    own: HashSet<Vec<u8>>,
    cancelled: Arc<AtomicBool>,
}

impl RootTree {
    /// Begins in an empty folder, to which nobody else may have access.
    pub(crate) fn new(folder: &Path, limits: Limits, cancelled: Arc<AtomicBool>) -> io::Result<RootTree> {
        let root = fs::open(folder, DIRECTORY, Mode::empty())?;
        fs::fchmod(&root, DIRECTORY_MODE)?;
        let budget = Budget {
            limits,
            bytes: limits.unpacked_bytes_max,
            entries: limits.entries_max,
            name_bytes: limits.name_bytes_max,
        };
        let directory_times = HashMap::from([(Vec::new(), 0)]);
        Ok(RootTree { root, budget, directory_times, own: HashSet::new(), cancelled })
    }

    /// Applies one layer, given as its uncompressed tar. After an error the tree is of no use.
    pub(crate) fn apply(&mut self, tar: impl Read) -> Result<(), LayerError> {
        self.own.clear();
        let bytes_max = self.budget.limits.unpacked_bytes_max;
        let mut bounded = Bounded { inner: tar, left: self.budget.bytes, exhausted: false };
        let outcome = self.apply_entries(&mut bounded);
        self.budget.bytes = bounded.left;
        match outcome {
            Err(_) if bounded.exhausted => Err(LayerError::TooLarge { what: "bytes", max: bytes_max }),
            outcome => outcome,
        }
    }

    fn apply_entries(&mut self, tar: impl Read) -> Result<(), LayerError> {
        let mut stream = TarStream::new(tar);
        while let Some(entry) = stream.next_entry()? {
            self.check_cancelled()?;
            self.budget.entry(entry.path.len())?;
            self.apply_entry(&entry, &mut stream)?;
        }
        stream.drain()
    }

    /// Sets the directories' times. Call once, after the last layer.
    pub(crate) fn finish(&mut self) -> Result<(), LayerError> {
        for (path, seconds) in self.directory_times.drain() {
            let opened = if path.is_empty() {
                self.root.try_clone()
            } else {
                open_beneath(&self.root, &path, DIRECTORY, Mode::empty()).map_err(io::Error::from)
            };
            match opened {
                Ok(directory) => fs::futimens(&directory, &times(seconds))
                    .map_err(|error| disk(&path, "setting a directory's time", error.into()))?,
                // A later layer removed it, or put another thing in its place.
                Err(_) => continue,
            }
        }
        Ok(())
    }

    /// The image's account files. Links are followed, but only within the root.
    pub(crate) fn accounts(&self) -> Result<Accounts, RootError> {
        Ok(Accounts {
            passwd: self.account_file("/etc/passwd", "etc/passwd")?,
            group: self.account_file("/etc/group", "etc/group")?,
        })
    }

    fn account_file(&self, file: &'static str, path: &str) -> Result<Vec<u8>, RootError> {
        let fail = |source: io::Error| RootError::AccountFile { file, source };
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        // Not blocking: it might be a pipe.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = match fs::openat2(&self.root, path, flags, Mode::empty(), inside) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
            opened => opened.map_err(|error| fail(error.into()))?,
        };
        let stat = fs::fstat(&opened).map_err(|error| fail(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(fail(io::Error::other("it is not a regular file")));
        }
        let mut bytes = Vec::new();
        File::from(opened).take(ACCOUNT_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() as u64 > ACCOUNT_FILE_BYTES_MAX {
            return Err(fail(io::Error::other("it is too long")));
        }
        Ok(bytes)
    }

    fn check_cancelled(&self) -> Result<(), LayerError> {
        if self.cancelled.load(Ordering::Relaxed) { Err(LayerError::Cancelled) } else { Ok(()) }
    }

    fn apply_entry<R: Read>(
        &mut self,
        entry: &TarEntry,
        stream: &mut TarStream<R>,
    ) -> Result<(), LayerError> {
        let path = match parse_name(&entry.path)? {
            EntryName::Root => return self.apply_root(entry),
            EntryName::Ignored => return Ok(()),
            EntryName::Whiteout(path) => return self.remove_lower(&path),
            EntryName::Opaque(directory) => return self.clear_lower(directory.as_ref()),
            EntryName::Path(path) => path,
        };
        let refuse = |kind| Err(LayerError::Forbidden { path: path.display(), kind });
        match entry.kind {
            EntryType::Directory => self.make_directory(&path, entry),
            // How archives from before POSIX spell a directory.
            EntryType::Regular if entry.path.ends_with(b"/") => self.make_directory(&path, entry),
            EntryType::Regular | EntryType::Continuous => self.make_file(&path, entry, stream),
            EntryType::Symlink => self.make_symlink(&path, entry),
            EntryType::Link => self.make_hard_link(&path, entry),
            EntryType::Fifo => self.make_fifo(&path, entry),
            EntryType::Char | EntryType::Block => refuse("a device node"),
            EntryType::GNUSparse => refuse("a sparse file"),
            _ => refuse("of an unknown type"),
        }
    }

    fn apply_root(&mut self, entry: &TarEntry) -> Result<(), LayerError> {
        if entry.kind != EntryType::Directory {
            return Err(LayerError::Forbidden { path: "/".to_owned(), kind: "not a directory" });
        }
        self.directory_times.insert(Vec::new(), entry.mtime);
        set_attributes(&self.root, entry)
    }

    fn make_directory(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<(), LayerError> {
        let directory = self.directory(path)?;
        self.directory_times.insert(path.as_bytes().to_vec(), entry.mtime);
        set_attributes(&directory, entry)
    }

    fn make_file<R: Read>(
        &mut self,
        path: &EntryPath,
        entry: &TarEntry,
        stream: &mut TarStream<R>,
    ) -> Result<(), LayerError> {
        let parent = self.vacate(path)?;
        let fail = |doing| move |error: io::Error| disk(path.as_bytes(), doing, error);
        let mut file = open_beneath(&parent, path.name(), NEW_FILE, Mode::from_raw_mode(0o600))
            .map(File::from)
            .map_err(|error| fail("creating a file")(error.into()))?;
        let mut buffer = vec![0; COPY_BUFFER_BYTES.min(usize::try_from(entry.size).unwrap_or(usize::MAX))];
        loop {
            self.check_cancelled()?;
            match stream.read(&mut buffer).map_err(LayerError::Read)? {
                0 => break,
                bytes => file.write_all(&buffer[..bytes]).map_err(fail("writing a file"))?,
            }
        }
        set_attributes(&file, entry)?;
        fs::futimens(&file, &times(entry.mtime)).map_err(|error| fail("setting a file's time")(error.into()))
    }

    fn make_symlink(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<(), LayerError> {
        if entry.link.is_empty() || entry.link.len() > LINK_BYTES_MAX || entry.link.contains(&0) {
            let reason = "its link target is empty, too long or has a NUL byte";
            return Err(LayerError::Path { path: path.display(), reason });
        }
        let parent = self.vacate(path)?;
        // The target is only ever text here: nothing on the host resolves it.
        fs::symlinkat(&entry.link[..], &parent, path.name())
            .and_then(|()| self.own_by_name(&parent, path, entry))
            .map_err(|error| disk(path.as_bytes(), "making a symbolic link", error.into()))
    }

    fn make_fifo(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<(), LayerError> {
        let parent = self.vacate(path)?;
        // Made a moment ago by this very thread, so the name cannot be a link that chmod would follow.
        fs::mknodat(&parent, path.name(), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .and_then(|()| self.own_by_name(&parent, path, entry))
            .and_then(|()| fs::chmodat(&parent, path.name(), mode_of(entry), AtFlags::empty()))
            .map_err(|error| disk(path.as_bytes(), "making a named pipe", error.into()))
    }

    fn own_by_name(&self, parent: &OwnedFd, path: &EntryPath, entry: &TarEntry) -> Result<(), Errno> {
        let (uid, gid) = owner_of(entry);
        fs::chownat(parent, path.name(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        fs::utimensat(parent, path.name(), &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
    }

    fn make_hard_link(&mut self, path: &EntryPath, entry: &TarEntry) -> Result<(), LayerError> {
        let bad_target = || LayerError::HardLink { path: path.display(), target: printable(&entry.link) };
        let target = parse_path(&entry.link)?.ok_or_else(bad_target)?;
        if target == *path {
            return Err(bad_target());
        }
        let parent = self.vacate(path)?;
        let target_parent = self.existing_directory(target.parent()).map_err(|_| bad_target())?;
        let stat =
            fs::statat(&target_parent, target.name(), AtFlags::SYMLINK_NOFOLLOW).map_err(|_| bad_target())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(bad_target());
        }
        // Without AT_SYMLINK_FOLLOW: a link to a symbolic link is another name of that link.
        fs::linkat(&target_parent, target.name(), &parent, path.name(), AtFlags::empty())
            .map_err(|error| disk(path.as_bytes(), "making a hard link", error.into()))
    }

    /// Makes room for a new entry: its parent exists, and nothing has its name.
    fn vacate(&mut self, path: &EntryPath) -> Result<OwnedFd, LayerError> {
        let parent = match parse_path(path.parent())? {
            Some(parent) => self.directory(&parent)?,
            None => {
                self.existing_directory(b"").map_err(|error| disk(b"/", "opening the root", error.into()))?
            }
        };
        remove_tree(&parent, path.name())
            .map_err(|error| disk(path.as_bytes(), "removing what was there before", error))?;
        self.own.insert(path.as_bytes().to_vec());
        Ok(parent)
    }

    fn existing_directory(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        open_beneath(&self.root, if path.is_empty() { b"." } else { path }, DIRECTORY, Mode::empty())
    }

    /// Opens a directory, made first if it is missing, together with those above it.
    fn directory(&mut self, path: &EntryPath) -> Result<OwnedFd, LayerError> {
        if self.own.contains(path.as_bytes())
            && let Ok(directory) = self.existing_directory(path.as_bytes())
        {
            return Ok(directory);
        }
        let fail = |doing| move |error: Errno| disk(path.as_bytes(), doing, error.into());
        let mut current = self.existing_directory(b"").map_err(fail("opening the root"))?;
        let mut so_far = Vec::with_capacity(path.as_bytes().len());
        for component in path.components() {
            if !so_far.is_empty() {
                so_far.push(b'/');
            }
            so_far.extend_from_slice(component);
            let opened = match open_beneath(&current, component, DIRECTORY, Mode::empty()) {
                Err(Errno::NOTDIR | Errno::LOOP) if self.own.contains(&so_far) => {
                    return Err(LayerError::ThroughNonDirectory { path: path.display() });
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    fs::unlinkat(&current, component, AtFlags::empty())
                        .map_err(fail("replacing an earlier layer's file by a directory"))?;
                    Err(Errno::NOENT)
                }
                opened => opened,
            };
            let next = match opened {
                Err(Errno::NOENT) => self.new_directory(&current, component, &so_far)?,
                opened => opened.map_err(fail("opening a directory"))?,
            };
            self.own.insert(so_far.clone());
            current = next;
        }
        Ok(current)
    }

    fn new_directory(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<OwnedFd, LayerError> {
        self.budget.entry(path.len())?;
        self.directory_times.insert(path.to_vec(), 0);
        let made = fs::mkdirat(parent, name, DIRECTORY_MODE)
            .and_then(|()| open_beneath(parent, name, DIRECTORY, Mode::empty()));
        made.and_then(|directory| fs::fchmod(&directory, DIRECTORY_MODE).map(|()| directory))
            .map_err(|error| disk(path, "making a directory", error.into()))
    }

    /// Removes what earlier layers have at a path. A path that leads nowhere has nothing to remove.
    fn remove_lower(&mut self, path: &EntryPath) -> Result<(), LayerError> {
        if self.own.contains(path.as_bytes()) {
            return self.clear_lower(Some(path));
        }
        match self.existing_directory(path.parent()) {
            Ok(parent) => remove_tree(&parent, path.name())
                .map_err(|error| disk(path.as_bytes(), "applying a whiteout", error)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
            Err(error) => Err(disk(path.as_bytes(), "applying a whiteout", error.into())),
        }
    }

    /// Removes what earlier layers have in a directory; what this layer put there stays.
    fn clear_lower(&mut self, directory: Option<&EntryPath>) -> Result<(), LayerError> {
        let path = directory.map_or(&b""[..], EntryPath::as_bytes);
        let opened = match self.existing_directory(path) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            opened => opened.map_err(|error| disk(path, "clearing a directory", error.into()))?,
        };
        let names = names_in(&opened).map_err(|error| disk(path, "clearing a directory", error))?;
        for name in names {
            let child = if path.is_empty() { name.clone() } else { [path, &name].join(&b'/') };
            if !self.own.contains(&child) {
                remove_tree(&opened, &name).map_err(|error| disk(&child, "clearing a directory", error))?;
            } else if let Some(child) = parse_path(&child)? {
                self.clear_lower(Some(&child))?;
            }
        }
        Ok(())
    }
}

/// Opens beneath a directory handle; see the module's text.
fn open_beneath(at: impl AsFd, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    fs::openat2(at, path, flags, mode, BENEATH)
}

/// Removes a name and all below it; not an error if there is none. Depth is bounded by [`parse_path`], which
/// every name in the tree has passed.
fn remove_tree(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = open_beneath(parent, name, DIRECTORY, Mode::empty())?;
    for child in names_in(&directory)? {
        remove_tree(&directory, &child)?;
    }
    Ok(fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

fn names_in(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in fs::Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn owner_of(entry: &TarEntry) -> (Uid, Gid) {
    (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid))
}

fn mode_of(entry: &TarEntry) -> Mode {
    Mode::from_raw_mode(entry.mode & 0o7777)
}

fn times(seconds: i64) -> Timestamps {
    let at = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: at, last_modification: at }
}

/// Owner, then mode, then attributes: a change of owner clears set-id bits and capabilities.
fn set_attributes(file: impl AsFd, entry: &TarEntry) -> Result<(), LayerError> {
    let fail = |doing| move |error: Errno| disk(&entry.path, doing, error.into());
    let (uid, gid) = owner_of(entry);
    fs::fchown(&file, Some(uid), Some(gid)).map_err(fail("setting its owner (is this process root?)"))?;
    fs::fchmod(&file, mode_of(entry)).map_err(fail("setting its mode"))?;
    for (name, value) in &entry.xattrs {
        let allowed = name == b"security.capability" || name.starts_with(b"user.");
        if !allowed || name.contains(&0) {
            return Err(LayerError::Xattr { path: printable(&entry.path), name: printable(name) });
        }
        fs::fsetxattr(&file, OsStr::from_bytes(name), value, XattrFlags::empty())
            .map_err(fail("setting an extended attribute"))?;
    }
    Ok(())
}

fn disk(path: &[u8], doing: &'static str, source: io::Error) -> LayerError {
    LayerError::Disk { path: printable(path), doing, source }
}

/// Ends with an error once more comes than may be unpacked.
struct Bounded<R> {
    inner: R,
    left: u64,
    exhausted: bool,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.inner.read(buffer)?;
        match self.left.checked_sub(bytes as u64) {
            Some(left) => self.left = left,
            None => {
                self.exhausted = true;
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
