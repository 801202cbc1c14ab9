//! Whether this machine can run microVMs: the guest's kernel and init, and the right to make network devices.

use std::path::{Path, PathBuf};

/// What the folder must hold.
const FILES: [&str; 2] = ["vmlinux", "initramfs.cpio"];

/// The folder of assets: as named, else beside the program.
///
/// # Errors
/// A sentence that says what is missing.
pub(crate) fn find(named: Option<&Path>) -> Result<PathBuf, String> {
    let complete = |folder: &Path| FILES.iter().all(|file| folder.join(file).is_file());
    if let Some(folder) = named {
        return if complete(folder) {
            folder.canonicalize().map_err(|e| format!("{} cannot be used: {e}", folder.display()))
        } else {
            Err(format!("{} does not hold {}", folder.display(), FILES.join(" and ")))
        };
    }
    let program =
        std::env::current_exe().map_err(|e| format!("this program's own folder is not known: {e}"))?;
    let beside = program.parent().and_then(Path::parent);
    let places = beside.map(|up| [up.join("assets"), up.join("share/holdfast")]);
    let found = places.iter().flatten().find(|folder| complete(folder)).cloned();
    found.ok_or_else(|| {
        "there is no guest kernel; build one with `cargo xtask assets`, or name its folder with --assets"
            .into()
    })
}

/// Why this process may not run microVMs, if so.
pub(crate) fn privileges() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("microVMs need network devices, which only root can make".into());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Err("/dev/net/tun does not exist on this machine".into());
    }
    Ok(())
}
