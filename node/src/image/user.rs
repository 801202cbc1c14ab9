//! Whom an image's processes run as: a name or number, looked up in the image's own passwd and group files.
//!
//! The look-up happens on the host, over the bytes of those two files; nothing of the image is ever run for it.

use serde::{Deserialize, Serialize};

use super::error::RootError;

/// `passwd` and `group` are read up to here; a longer file is refused.
pub const ACCOUNT_FILE_BYTES_MAX: u64 = 1 << 20;

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageUser {
    /// User number.
    pub uid: u32,
    /// Primary group number.
    pub gid: u32,
    /// Home directory; `/` where the passwd file has none.
    pub home: String,
}

/// The image's account files, as they are in its root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    pub(crate) passwd: Vec<u8>,
    pub(crate) group: Vec<u8>,
}

struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl Accounts {
    /// Resolves `user`, `uid`, `user:group` or any mix of names and numbers; an empty text is root.
    ///
    /// A number needs no entry in the files. Without a group, a user that the passwd file knows has the group
    /// written there, any other group 0.
    pub fn resolve(&self, user: &str) -> Result<ImageUser, RootError> {
        let (user, group) = match user.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (user, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let number: Option<u32> = user.parse().ok();
        // A name wins over a number that is spelled alike, as it does for useradd and the container runtimes.
        let known = self
            .users()
            .find(|line| line.name == user)
            .or_else(|| number.and_then(|uid| self.users().find(|line| line.uid == uid)));
        let uid = match (&known, number) {
            (Some(line), _) => line.uid,
            (None, Some(uid)) => uid,
            (None, None) => return Err(unknown("user", user, "/etc/passwd")),
        };
        let gid = match (group, &known) {
            (Some(group), _) => self.group(group)?,
            (None, Some(line)) => line.gid,
            (None, None) => 0,
        };
        let home = known.map(|line| line.home).filter(|home| home.starts_with('/')).unwrap_or("/");
        Ok(ImageUser { uid, gid, home: home.to_owned() })
    }

    fn users(&self) -> impl Iterator<Item = PasswdLine<'_>> {
        lines(&self.passwd).filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _password) = (fields.next()?, fields.next()?);
            let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let (_comment, home) = (fields.next(), fields.next().unwrap_or(""));
            Some(PasswdLine { name, uid, gid, home })
        })
    }

    fn group(&self, group: &str) -> Result<u32, RootError> {
        let named = lines(&self.group).find_map(|line| {
            let mut fields = line.split(':');
            let (name, _password) = (fields.next()?, fields.next()?);
            fields.next()?.parse().ok().filter(|_: &u32| name == group)
        });
        named.or_else(|| group.parse().ok()).ok_or_else(|| unknown("group", group, "/etc/group"))
    }
}

/// Lines that are text; one that is not cannot name anybody.
fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|&byte| byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok())
}

fn unknown(what: &'static str, name: &str, file: &'static str) -> RootError {
    RootError::UnknownUser { what, name: name.chars().take(64).collect(), file }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: b"root:x:0:0:root:/root:/bin/sh\n\xff\xfe:x:1:1::/:\nbroken\nweb:x:1000:1001:,,,:/srv/web:/bin/false\n4000:x:5:6::relative:\n".to_vec(),
            group: b"root:x:0:\nweb:x:1001:\nmail:x:8:web\n".to_vec(),
        }
    }

    #[track_caller]
    fn resolves(user: &str, uid: u32, gid: u32, home: &str) {
        assert_eq!(
            accounts().resolve(user).unwrap(),
            ImageUser { uid, gid, home: home.to_owned() },
            "{user:?}"
        );
    }

    #[test]
    fn names_and_numbers() {
        resolves("", 0, 0, "/root");
        resolves("root", 0, 0, "/root");
        resolves("web", 1000, 1001, "/srv/web");
        resolves("1000", 1000, 1001, "/srv/web");
        resolves("web:mail", 1000, 8, "/srv/web");
        resolves("web:", 1000, 1001, "/srv/web");
        resolves("web:77", 1000, 77, "/srv/web");
        resolves("65534", 65534, 0, "/");
        resolves("65534:mail", 65534, 8, "/");
        resolves("4000", 5, 6, "/");
    }

    #[test]
    fn unknown_names_are_refused() {
        for user in ["nobody", "web:nobody", "broken", "-1", "4294967296", "web:root:x"] {
            assert!(matches!(accounts().resolve(user), Err(RootError::UnknownUser { .. })), "{user:?}");
        }
        assert!(Accounts::default().resolve("0:0").is_ok());
    }

    proptest! {
        #[test]
        fn any_files_are_answered(
            passwd in proptest::collection::vec(any::<u8>(), 0..300), user in "\\PC{0,12}"
        ) {
            let _ = Accounts { group: passwd.clone(), passwd }.resolve(&user);
        }
    }
}
