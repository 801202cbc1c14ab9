//! The file itself: how it is opened, made to stay, and moved aside.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use redb::{Builder, Database, DatabaseError};

/// What is added to the name of a damaged file; a later one replaces an earlier one.
const DAMAGED_SUFFIX: &str = ".damaged";

/// Where a replica's database lies. The product's is a file in the agent's folder; a simulation has another.
pub trait ReplicaFile: fmt::Debug + Send + Sync {
    /// Its name, for errors and logs.
    fn path(&self) -> &Path;

    /// Makes the folder that it lies in.
    ///
    /// # Errors
    /// When the system refuses.
    fn make_folder(&self) -> io::Result<()>;

    /// Opens it, made if it is not there; a new one's name is durable when this returns.
    ///
    /// # Errors
    /// When the storage fails, or what is there is no sound database.
    fn open(&self, builder: &Builder) -> Result<Database, DatabaseError>;

    /// Lets go of what the system's cache has of it. After a failed sync that is not what the disk has, and no later sync
    /// writes it.
    fn forget_cached(&self);

    /// Moves it aside, whole and for good, and says where it is now.
    ///
    /// # Errors
    /// When the system refuses.
    fn set_aside(&self) -> io::Result<PathBuf>;
}

/// A file at a path.
pub(super) fn on_disk(path: &Path) -> Box<dyn ReplicaFile> {
    Box::new(OnDisk { path: path.to_owned() })
}

#[derive(Debug)]
struct OnDisk {
    path: PathBuf,
}

impl OnDisk {
    fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(self.folder())?.sync_all()
    }
}

impl ReplicaFile for OnDisk {
    fn path(&self) -> &Path {
        &self.path
    }

    fn make_folder(&self) -> io::Result<()> {
        fs::create_dir_all(self.folder())
    }

    fn open(&self, builder: &Builder) -> Result<Database, DatabaseError> {
        let existed = self.path.exists();
        let database = builder.create(&self.path)?;
        if !existed {
            self.sync_folder()?;
        }
        Ok(database)
    }

    fn forget_cached(&self) {
        // Where this fails too, the file is as it would be without it, and its checksums are all that is left.
        if let Ok(file) = File::open(&self.path) {
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }

    fn set_aside(&self) -> io::Result<PathBuf> {
        let mut aside = self.path.clone().into_os_string();
        aside.push(DAMAGED_SUFFIX);
        let aside = PathBuf::from(aside);
        fs::rename(&self.path, &aside)?;
        self.sync_folder()?;
        Ok(aside)
    }
}
