//! Starting programs as the workload's user: the workload itself, and the commands of health checks.

use std::{
    fs, io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use holdfast_guest::config::Workload;
use rustix::process::{Resource, Rlimit};

use crate::InitError;

/// Who a program runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Where a program's output goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Output {
    /// To pipes that the caller reads.
    Piped,
    /// Nowhere.
    Discarded,
}

/// Starts a program in the workload's environment, in a session of its own so that it can be signalled as a group.
pub(crate) fn spawn(
    workload: &Workload,
    argv: &[String],
    user: Credentials,
    output: Output,
) -> Result<Child, InitError> {
    let sink = || match output {
        Output::Piped => Stdio::piped(),
        Output::Discarded => Stdio::null(),
    };
    let mut command = command(workload, argv, user)?;
    command.stdin(Stdio::null()).stdout(sink()).stderr(sink());
    let program = || argv.first().cloned().unwrap_or_default();
    command.spawn().map_err(|source| InitError::Exec { program: program(), source })
}

/// A program as the workload's user, in its environment and folder, and in a session of its own.
pub(crate) fn command(workload: &Workload, argv: &[String], user: Credentials) -> Result<Command, InitError> {
    let (program, arguments) = argv.split_first().ok_or(InitError::NoCommand)?;
    let workdir = if workload.workdir.is_empty() { "/" } else { &workload.workdir };
    if !Path::new(workdir).exists() {
        fs::create_dir_all(workdir)
            .and_then(|()| std::os::unix::fs::chown(workdir, Some(user.uid), Some(user.gid)))
            .map_err(InitError::at("create the working folder", workdir))?;
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(workload.env.iter().map(|(name, value)| (name, value)))
        .current_dir(workdir)
        .uid(user.uid)
        .gid(user.gid);
    // SAFETY: the closure makes one system call between fork and exec; it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
    Ok(command)
}

/// Files that a program may have open, before and after it asks for more.
const OPEN_FILES: (u64, u64) = (65_536, 524_288);

/// What each of the tenant's programs may take of the guest's kernel, and this process, which they have it from: only root may
/// raise a limit. Memory and processes are bounded by the machine itself; a core file would hold secrets.
pub(crate) fn limit() -> Result<(), InitError> {
    let (current, maximum) = OPEN_FILES;
    let files = Rlimit { current: Some(current), maximum: Some(maximum) };
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    for (resource, limit) in [(Resource::Nofile, files), (Resource::Core, none)] {
        rustix::process::setrlimit(resource, limit)
            .map_err(|errno| InitError::at("set", "the limits of programs")(errno.into()))?;
    }
    Ok(())
}

/// The shell of a user: the one that the image's `/etc/passwd` names, if it is there and lets anybody in.
pub(crate) fn shell_of(user: Credentials) -> String {
    let named = named_shell(user.uid, &fs::read_to_string("/etc/passwd").unwrap_or_default());
    named.filter(|shell| Path::new(shell).exists()).unwrap_or_else(|| "/bin/sh".to_owned())
}

fn named_shell(uid: u32, passwd: &str) -> Option<String> {
    let shell = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(6).map(|shell| shell.trim()))?
    })?;
    let refuses = shell.ends_with("/nologin") || shell.ends_with("/false");
    (shell.starts_with('/') && !refuses).then(|| shell.to_owned())
}

/// Finds a user as an OCI image names it: `user[:group]`, each a name or a number; empty is root.
pub(crate) fn find_user(user: &str) -> Result<Credentials, InitError> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    resolve_user(user, &read("/etc/passwd"), &read("/etc/group"))
}

fn resolve_user(user: &str, passwd: &str, group: &str) -> Result<Credentials, InitError> {
    let (user, group_name) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let no_such = |name: &str| InitError::NoSuchUser { name: name.to_owned() };
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&user) || fields.get(2) == Some(&user));
    let field = |index: usize| {
        entry.as_ref().and_then(|fields| fields.get(index)).and_then(|text| text.parse::<u32>().ok())
    };
    let uid = match user.parse() {
        Ok(uid) => uid,
        Err(_) => field(2).ok_or_else(|| no_such(user))?,
    };
    let gid = match group_name {
        None | Some("") => field(3).unwrap_or(0),
        Some(name) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => group
                .lines()
                .map(|line| line.split(':').collect::<Vec<_>>())
                .find(|fields| fields.first() == Some(&name))
                .and_then(|fields| fields.get(2).and_then(|gid| gid.parse().ok()))
                .ok_or_else(|| no_such(name))?,
        },
    };
    Ok(Credentials { uid, gid })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:web\n";

    fn ids(user: &str) -> Option<(u32, u32)> {
        resolve_user(user, PASSWD, GROUP).ok().map(|found| (found.uid, found.gid))
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        assert_eq!(ids(""), Some((0, 0)));
        assert_eq!(ids("root"), Some((0, 0)));
        assert_eq!(ids("web"), Some((33, 34)));
        assert_eq!(ids("33"), Some((33, 34)));
        assert_eq!(ids("1000"), Some((1000, 0)));
        assert_eq!(ids("web:staff"), Some((33, 50)));
        assert_eq!(ids("1000:7"), Some((1000, 7)));
    }

    #[test]
    fn a_users_shell_is_the_one_that_lets_somebody_in() {
        assert_eq!(named_shell(0, PASSWD).as_deref(), Some("/bin/sh"));
        assert_eq!(named_shell(33, PASSWD), None, "/bin/false lets nobody in");
        assert_eq!(named_shell(34, PASSWD), None);
        assert_eq!(named_shell(7, "a:x:7:7:::sh"), None, "not a path");
    }

    #[test]
    fn unknown_users_are_refused_and_never_become_root() {
        for user in ["nobody-here", "web:nobody-here", "-1", "99999999999", "broken"] {
            assert_eq!(ids(user), None, "{user}");
        }
    }
}
