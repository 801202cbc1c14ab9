//! A user id of its own for every VM that lives: claimed by owning a folder, so that a claim lasts as long as what it is
//! for, and a crash leaks none.
//!
//! The claim is the owner of the folder `vmm` in the machine's folder. Where to begin looking follows from the data
//! folder, so that agents that share a host and a range seldom meet; that no process of the host's has the id is
//! looked at as well.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::plan::Identity;

/// The folder whose owner is the claim.
pub const CLAIM_FOLDER: &str = "vmm";

/// The first user id of the default range: systemd and the tools for subordinate ids leave it alone.
pub const FIRST_DEFAULT: u32 = 0x7000_0000;

/// How many ids the default range has.
pub const COUNT_DEFAULT: u32 = 65_536;

/// User and group ids for VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first one.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Default for IdRange {
    fn default() -> Self {
        Self { first: FIRST_DEFAULT, count: COUNT_DEFAULT }
    }
}

/// Why no id could be claimed.
#[derive(Debug, thiserror::Error)]
pub enum IdError {
    /// The range cannot be used.
    #[error(
        "The range of {count} user ids from {first} cannot be used: it must hold no id below 1000 and end below 2^31."
    )]
    Range {
        /// Its first id.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Every id is taken.
    #[error(
        "Every user id from {first} to {last} is taken by a VM that lives; give the node a larger range."
    )]
    Exhausted {
        /// The first id of the range.
        first: u32,
        /// The last one.
        last: u32,
    },
    /// A folder.
    #[error("'{}' could not be {action}, so it is not known which user ids are free.", .path.display())]
    Folder {
        /// Which one.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl IdRange {
    /// A range that the system leaves to us.
    pub fn new(first: u32, count: u32) -> Result<Self, IdError> {
        let end = first.checked_add(count).filter(|end| *end <= i32::MAX.cast_unsigned());
        if first < 1_000 || count == 0 || end.is_none() {
            return Err(IdError::Range { first, count });
        }
        Ok(Self { first, count })
    }

    fn contains(self, id: u32) -> bool {
        id.checked_sub(self.first).is_some_and(|offset| offset < self.count)
    }

    fn nth(self, n: u32) -> u32 {
        self.first + n % self.count
    }
}

/// Gives out ids within one data folder.
#[derive(Debug)]
pub struct Ids {
    range: IdRange,
    data_dir: PathBuf,
    /// One claim at a time: between looking and owning, nobody else looks.
    claiming: Mutex<()>,
}

impl Ids {
    /// For the machines whose folders lie in this folder or in its folders.
    pub fn new(range: IdRange, data_dir: &Path) -> Self {
        Self { range, data_dir: data_dir.to_owned(), claiming: Mutex::new(()) }
    }

    /// An id for the machine with this folder, which must exist: the one that it has, or one that no other has.
    pub fn claim(&self, machine: &Path) -> Result<Identity, IdError> {
        let _alone = self.claiming.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = machine.join(CLAIM_FOLDER);
        let error = |action, source| IdError::Folder { path: folder.clone(), action, source };
        let taken = self.taken(machine)?;
        match fs::symlink_metadata(&folder) {
            Ok(meta) if meta.is_dir() && self.range.contains(meta.uid()) && !taken.contains(&meta.uid()) => {
                return Ok(Identity { uid: meta.uid(), gid: meta.uid() });
            }
            Ok(_) => {}
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|source| error("made", source))?;
            }
            Err(source) => return Err(error("looked at", source)),
        }
        let begin = self.begin();
        let free = (0..self.range.count)
            .map(|n| self.range.nth(begin.wrapping_add(n)))
            .find(|id| !taken.contains(id))
            .ok_or(IdError::Exhausted {
                first: self.range.first,
                last: self.range.nth(self.range.count - 1),
            })?;
        std::os::unix::fs::lchown(&folder, Some(free), Some(free))
            .map_err(|source| error("handed over", source))?;
        Ok(Identity { uid: free, gid: free })
    }

    /// Ids of the range that another machine's folder, or any process, has.
    fn taken(&self, but: &Path) -> Result<BTreeSet<u32>, IdError> {
        let mut taken = BTreeSet::new();
        let mut look = |machine: PathBuf| {
            if machine != but {
                taken.extend(fs::symlink_metadata(machine.join(CLAIM_FOLDER)).map(|meta| meta.uid()).ok());
            }
        };
        for folder in folders(&self.data_dir)? {
            // The folder of machines is the only one that may hold many.
            if folder.join(CLAIM_FOLDER).is_dir() {
                look(folder);
            } else if folder.file_name().is_some_and(|name| name == "vms") {
                folders(&folder)?.into_iter().for_each(&mut look);
            }
        }
        let own = fs::symlink_metadata(but.join(CLAIM_FOLDER)).map(|meta| meta.uid()).ok();
        for process in folders(Path::new("/proc"))? {
            let owner = fs::symlink_metadata(&process).map(|meta| meta.uid());
            // Its own former process may still be going away.
            taken.extend(owner.ok().filter(|uid| self.range.contains(*uid) && Some(*uid) != own));
        }
        Ok(taken)
    }

    fn begin(&self) -> u32 {
        // FNV-1a: spreads folders over the range, no more is needed.
        let bytes = self.data_dir.as_os_str().as_encoded_bytes();
        bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
            % self.range.count
    }
}

fn folders(path: &Path) -> Result<Vec<PathBuf>, IdError> {
    let error = |source| IdError::Folder { path: path.to_owned(), action: "listed", source };
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let entry = entry.map_err(error)?;
        // What goes away meanwhile has no claim.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(data: &Path, name: &str) -> PathBuf {
        let folder = data.join("vms").join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn no_two_machines_that_live_share_an_id_and_one_that_is_gone_gives_its_back() {
        let data = tempfile::tempdir().unwrap();
        let range = IdRange::new(1_900_000_000, 3).unwrap();
        let machines = ["a", "b", "c"].map(|name| machine(data.path(), name));
        let claims =
            machines.each_ref().map(|folder| Ids::new(range, data.path()).claim(folder).unwrap().uid);
        assert_eq!(BTreeSet::from(claims).len(), 3);
        assert!(claims.iter().all(|uid| range.contains(*uid)));
        // Another agent, after a crash, finds the same.
        let ids = Ids::new(range, data.path());
        assert_eq!(machines.each_ref().map(|folder| ids.claim(folder).unwrap().uid), claims);
        let fourth = machine(data.path(), "d");
        assert!(matches!(ids.claim(&fourth), Err(IdError::Exhausted { .. })));
        fs::remove_dir_all(&machines[1]).unwrap();
        assert_eq!(ids.claim(&fourth).unwrap().uid, claims[1]);
    }

    #[test]
    fn an_id_that_a_process_has_is_left_alone() {
        use std::os::unix::process::CommandExt;
        let data = tempfile::tempdir().unwrap();
        let range = IdRange::new(1_900_000_100, 2).unwrap();
        let mut stranger = std::process::Command::new("cat")
            .uid(range.first)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let first = Ids::new(range, data.path()).claim(&machine(data.path(), "a")).unwrap();
        assert_eq!(first.uid, range.first + 1);
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn a_range_with_root_in_it_is_refused() {
        for (first, count) in [(0, 10), (999, 1), (2_000, 0), (u32::MAX, 2), (0x7fff_ffff, 2)] {
            assert!(matches!(IdRange::new(first, count), Err(IdError::Range { .. })), "{first} {count}");
        }
    }
}
