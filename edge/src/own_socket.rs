//! Sockets in the edge's folder, for the edge's own user alone.

use rustix::fs::{Mode, chmod};
use std::io;
use std::path::Path;
use tokio::net::UnixListener;

/// Makes the socket, in place of one that an earlier process left.
///
/// # Errors
/// What the system says.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = UnixListener::bind(path)?;
    chmod(path, Mode::RUSR | Mode::WUSR)?;
    Ok(socket)
}
