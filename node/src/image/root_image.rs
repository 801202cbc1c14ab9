//! An unpacked root becomes one EROFS file: read-only by format, made without mounting anything.
//!
//! The same tree yields the same bytes: the volume's id comes from the manifest's digest, its time is fixed, and
//! the files' own times are kept (Python, for one, recompiles what has another time than it remembers).
//! Not compressed: the guest then reads pages straight from the host's cache.

use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use super::digest::Digest;
use super::error::RootError;

/// From Debian's `erofs-utils`.
const TOOL: &str = "mkfs.erofs";
/// Where it is looked for; the agent's own PATH may lack the system folders.
const TOOL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The volume's own time, and the latest that a file in it may have: the first second of 2100.
const VOLUME_TIME: &str = "4102444800";
/// What of the tool's complaint goes into the error.
const STDERR_BYTES_MAX: usize = 1000;

/// Makes `output` from the tree below `root`. The tool is killed if this is dropped.
pub(crate) async fn make_erofs(root: &Path, output: &Path, manifest: Digest) -> Result<(), RootError> {
    let made = Command::new(TOOL)
        .arg("--quiet")
        .arg(format!("-U{}", volume_id(manifest)))
        .arg(output)
        // Relative, so that the longest path in the image is not made longer by where it is unpacked.
        .arg(".")
        .current_dir(root)
        .env_clear()
        .env("PATH", TOOL_PATH)
        .env("LC_ALL", "C")
        .env("SOURCE_DATE_EPOCH", VOLUME_TIME)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    match made {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RootError::ToolMissing),
        Err(error) => Err(RootError::ToolStart(error)),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let end = output.stderr.len().saturating_sub(STDERR_BYTES_MAX);
            let stderr = String::from_utf8_lossy(&output.stderr[end..]).trim().to_owned();
            Err(RootError::ToolFailed { status: output.status.to_string(), stderr })
        }
    }
}

/// A UUID of version 8 (RFC 9562: the maker's own scheme) from the manifest's digest.
fn volume_id(manifest: Digest) -> String {
    let mut id = [0; 16];
    id.copy_from_slice(&manifest.as_bytes()[..16]);
    id[6] = id[6] & 0x0F | 0x80;
    id[8] = id[8] & 0x3F | 0x80;
    let hex = data_encoding::HEXLOWER.encode(&id);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_id_is_a_uuid_of_version_8() {
        let id = volume_id(Digest::of(b""));
        assert_eq!(id, "e3b0c442-98fc-8c14-9afb-f4c8996fb924");
    }

    #[tokio::test]
    async fn a_failing_tool_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let missing_folder = folder.path().join("no/such/folder/root.erofs");
        let error = make_erofs(folder.path(), &missing_folder, Digest::of(b"")).await.unwrap_err();
        match error {
            RootError::ToolFailed { stderr, .. } => assert!(!stderr.is_empty()),
            RootError::ToolMissing => eprintln!("erofs-utils is not installed; nothing to see here"),
            other => panic!("{other:?}"),
        }
    }
}
