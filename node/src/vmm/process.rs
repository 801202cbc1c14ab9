//! The process and the folder of a machine: bounded output files, identity by start time.
//!
//! A guest chooses what it prints on its console and so how much its VMM writes. Every file that a VMM process
//! writes is therefore capped by the kernel ([`FILE_BYTES_MAX`], as `RLIMIT_FSIZE` with `SIGXFSZ` ignored): beyond
//! it, writes fail and the machine runs on.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::{VmmError, VmmKind};

/// The most bytes of any file that a VMM writes: its guest's boot console and its own error output.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The most bytes of a file that are read back to explain a failure.
const SAID_BYTES_MAX: u64 = 2048;

/// The longest folder path, in bytes: the kernel takes 107 bytes for a socket's name.
const FOLDER_PATH_BYTES_MAX: usize = 90;

/// The largest record that is read.
const RECORD_BYTES_MAX: u64 = 4096;

/// The boot console of the guest.
pub const CONSOLE_FILE: &str = "console.log";

/// What the VMM wrote to its standard error.
pub const STDERR_FILE: &str = "stderr.log";

/// The record by which a later agent adopts the machine.
const RECORD_FILE: &str = "vm.json";

/// Tells a process from any other that ever had its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks from the host's boot to the start of the process (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
    /// Which boot of the host.
    pub boot_id: String,
}

/// What the folder says of its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) instance_id: String,
    pub(crate) kind: VmmKind,
    pub(crate) process: Identity,
    /// The folder of its cgroup, if it has one.
    #[serde(default)]
    pub(crate) cgroup: Option<PathBuf>,
    /// The root that it was started with, if it has one. Absent in records of earlier builds.
    #[serde(default)]
    pub(crate) root: Option<PathBuf>,
}

impl Record {
    pub(crate) fn new(instance_id: &str, kind: VmmKind, process: Identity) -> Self {
        Self { version: 1, instance_id: instance_id.to_owned(), kind, process, cgroup: None, root: None }
    }

    /// Writes the record so that a crash leaves either none or a whole one.
    pub(crate) fn write(&self, folder: &Path) -> Result<(), VmmError> {
        let path = folder.join(RECORD_FILE);
        let fresh = folder.join("vm.json.new");
        let text =
            serde_json::to_vec(self).map_err(|source| VmmError::Record { path: path.clone(), source })?;
        fs::write(&fresh, text)
            .and_then(|()| File::open(&fresh)?.sync_all())
            .and_then(|()| fs::rename(&fresh, &path))
            .map_err(|source| VmmError::File { path, action: "written", source })
    }

    /// `None` if the folder holds no record.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>, VmmError> {
        let path = folder.join(RECORD_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(VmmError::File { path, action: "read", source }),
        };
        let mut text = Vec::new();
        match file.take(RECORD_BYTES_MAX).read_to_end(&mut text) {
            Ok(_) => {}
            Err(source) => return Err(VmmError::File { path, action: "read", source }),
        }
        serde_json::from_slice(&text).map(Some).map_err(|source| VmmError::Record { path, source })
    }
}

/// Refuses a folder in which no socket could be named.
pub(crate) fn check_folder_path(folder: &Path) -> Result<(), VmmError> {
    let problem = if !folder.is_absolute() {
        "its path is not absolute"
    } else if folder.as_os_str().len() > FOLDER_PATH_BYTES_MAX {
        "its path is longer than 90 bytes, and a socket in it could not be named; choose a shorter data folder"
    } else if folder.to_str().is_none_or(|text| text.contains([',', '\n'])) {
        "its path must be UTF-8 without commas"
    } else {
        return Ok(());
    };
    Err(VmmError::FolderPath { path: folder.to_owned(), problem })
}

/// Makes the folder of a new machine, mode 0700, and removes what a former one left in it.
pub(crate) fn prepare_folder(folder: &Path, stale: &[PathBuf]) -> Result<(), VmmError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|source| VmmError::File {
        path: folder.to_owned(),
        action: "created",
        source,
    })?;
    let is_folder = fs::symlink_metadata(folder).is_ok_and(|meta| meta.is_dir());
    if !is_folder {
        return Err(VmmError::FolderPath { path: folder.to_owned(), problem: "it is a symbolic link" });
    }
    let own = [RECORD_FILE, CONSOLE_FILE, STDERR_FILE].map(|name| folder.join(name));
    for path in own.iter().chain(stale) {
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(VmmError::File { path: path.clone(), action: "removed", source }),
        }
    }
    Ok(())
}

/// Opens a file of the machine's for what its VMM says.
pub(crate) fn output_file(folder: &Path, name: &str) -> Result<File, VmmError> {
    let path = folder.join(name);
    OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(|source| VmmError::File {
        path,
        action: "created",
        source,
    })
}

/// The identity of a process that lives; `None` if there is none with that id, or only its remains.
pub(crate) fn identify(pid: u32) -> Option<Identity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself hold spaces and parentheses; the fields go on after the last one.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?;
    // Field 22 of the file; `state` was field 3.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
    (!matches!(state, "Z" | "X")).then_some(Identity { pid, start_ticks, boot_id })
}

/// Opens a handle on the process if it is still the one that the identity names.
pub(crate) fn open_process(identity: &Identity) -> Result<Option<OwnedFd>, VmmError> {
    let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    // Open first and compare then: the handle cannot change its process between the two.
    let handle = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(handle) => handle,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => {
            return Err(VmmError::Process { pid: identity.pid, action: "opened", source: error.into() });
        }
    };
    Ok((identify(identity.pid).as_ref() == Some(identity)).then_some(handle))
}

/// Finds the process whose command line names a path: the machine whose record is lost.
pub(crate) fn find_by_argument(path: &Path) -> Option<Identity> {
    let wanted = path.as_os_str().as_bytes();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let names_it = line.split(|byte| *byte == 0).any(|argument| {
            // The path stands alone, as the process's name, or as a value within an option of an older release's QEMU.
            argument == wanted
                || argument.split(|byte| matches!(byte, b',' | b'=' | b':')).any(|value| value == wanted)
        });
        if names_it {
            return identify(pid);
        }
    }
    None
}

/// The end of a file that a VMM wrote, as one line of text for an error message.
pub(crate) fn said(path: PathBuf) -> String {
    let tail = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(SAID_BYTES_MAX)))?;
        let mut bytes = Vec::new();
        file.take(SAID_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = tail().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "nothing".to_owned() } else { lines.join(" / ").replace(char::is_control, " ") }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A process that lives until its input ends.
    fn some_process() -> std::process::Child {
        Command::new("cat").arg("-").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn i07_a_process_is_only_taken_for_a_machine_if_its_start_time_and_boot_agree() {
        let mut child = some_process();
        let identity = identify(child.id()).unwrap();
        assert!(open_process(&identity).unwrap().is_some());
        // The id was used again by a process that started later, or after the host was booted again.
        let later = Identity { start_ticks: identity.start_ticks + 1, ..identity.clone() };
        assert!(open_process(&later).unwrap().is_none());
        let other_boot = Identity { boot_id: "another".to_owned(), ..identity.clone() };
        assert!(open_process(&other_boot).unwrap().is_none());
        assert!(open_process(&Identity { pid: 0, ..identity.clone() }).unwrap().is_none());

        // Its remains, which nobody has waited for yet, are not a machine either.
        child.kill().unwrap();
        let gone = || identify(child.id()).is_none();
        while !gone() {
            std::thread::yield_now();
        }
        assert!(open_process(&identity).unwrap().is_none());
        child.wait().unwrap();
        assert!(open_process(&identity).unwrap().is_none());
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_a_broken_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(folder.path()).unwrap(), None);
        let process = Identity { pid: 7, start_ticks: 9, boot_id: "b".to_owned() };
        let record = Record::new("inst_1", VmmKind::QemuTcg, process);
        record.write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap(), Some(record));
        fs::write(folder.path().join(RECORD_FILE), "{").unwrap();
        let error = Record::read(folder.path()).unwrap_err();
        assert!(matches!(&error, VmmError::Record { path, .. } if path.ends_with(RECORD_FILE)), "{error}");
    }

    #[test]
    fn folders_in_which_no_socket_could_be_named_are_refused() {
        assert!(check_folder_path(Path::new("/var/lib/holdfast/node/vms/inst_01")).is_ok());
        let long = format!("/{}", "x".repeat(FOLDER_PATH_BYTES_MAX));
        for refused in ["relative/vms", "/with,comma", long.as_str()] {
            let error = check_folder_path(Path::new(refused)).unwrap_err();
            assert!(matches!(error, VmmError::FolderPath { .. }), "{error}");
        }
    }

    #[test]
    fn a_folder_is_private_and_no_symbolic_link() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("vm");
        prepare_folder(&folder, &[]).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        let link = parent.path().join("link");
        symlink(&folder, &link).unwrap();
        assert!(prepare_folder(&link, &[]).is_err());
    }

    #[test]
    fn what_a_vmm_said_is_bounded_and_printable() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("said");
        assert_eq!(said(file.clone()), "nothing");
        fs::write(&file, format!("{}\n\x1b[2Jend\n", "x".repeat(100_000))).unwrap();
        let text = said(file);
        assert!(text.len() <= 2 * SAID_BYTES_MAX as usize && text.ends_with("end"), "{text}");
        assert!(!text.contains(char::is_control));
    }
}
