//! An image of a shell and a few programs, for workloads that are scripts.

use std::collections::BTreeMap;

use super::{LayerFile, OciError, PushedImage, RunConfig, push_files};

/// Whom a workload may run as, beside root.
#[derive(Clone, Copy, Debug)]
pub struct Account<'a> {
    /// Its name, and its group's.
    pub name: &'a str,
    /// Its number, and its group's.
    pub id: u32,
    /// Its folder.
    pub home: &'a str,
}

/// Pushes Debian's static busybox, by the names of these programs of it, as `repository:one`.
///
/// # Errors
/// When busybox is not installed (`cargo xtask assets` does that), or the registry refuses.
pub async fn push(
    host: &str,
    repository: &str,
    account: Account<'_>,
    programs: &[&str],
) -> Result<PushedImage, OciError> {
    let path = std::path::PathBuf::from("/bin/busybox");
    let busybox = tokio::fs::read(&path).await.map_err(|source| OciError::File { path, source })?;
    let Account { name, id, home } = account;
    let passwd = format!("root:x:0:0::/:/bin/sh\n{name}:x:{id}:{id}::{home}:/bin/sh\n");
    let mut files = vec![
        LayerFile::directory("bin", 0o755),
        LayerFile::regular("bin/busybox", 0o755, busybox),
        LayerFile::directory("etc", 0o755),
        LayerFile::regular("etc/passwd", 0o644, passwd),
        LayerFile::regular("etc/group", 0o644, format!("root:x:0:\n{name}:x:{id}:\n")),
    ];
    files.extend(programs.iter().map(|program| LayerFile::symlink(format!("bin/{program}"), "busybox")));
    let env = BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]);
    push_files(host, repository, "one", &files, &RunConfig { env, ..RunConfig::default() }).await
}
