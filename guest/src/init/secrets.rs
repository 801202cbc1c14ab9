//! Secrets become files in memory and nothing else: not variables, not arguments, not log lines (I10).

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown},
};

use holdfast_guest::config::Secrets;

use crate::{InitError, workload::Credentials};

const FOLDER: &str = "/run/secrets";
const KEYS_FOLDER: &str = "/run/secrets/keys";

/// Writes the bundle, readable by the workload's user only.
pub(crate) fn write(secrets: &Secrets, owner: &Credentials) -> Result<(), InitError> {
    for folder in [FOLDER, KEYS_FOLDER] {
        DirBuilder::new().mode(0o700).create(folder).map_err(InitError::at("create", folder))?;
    }
    write_file("/run/secrets/platform.env", &secrets.platform_env, owner)?;
    for (key, value) in &secrets.keys {
        let plain =
            !key.is_empty() && key.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
        if !plain {
            let refused = io::Error::from(io::ErrorKind::InvalidInput);
            return Err(InitError::at("use as a key", key.clone())(refused));
        }
        write_file(&format!("{KEYS_FOLDER}/{key}"), value, owner)?;
    }
    for folder in [KEYS_FOLDER, FOLDER] {
        fs::metadata(folder)
            .and_then(|_| chown(folder, Some(owner.uid), Some(owner.gid)))
            .map_err(InitError::at("give away", folder))?;
    }
    Ok(())
}

fn write_file(path: &str, content: &[u8], owner: &Credentials) -> Result<(), InitError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| chown(path, Some(owner.uid), Some(owner.gid)))
        .map_err(InitError::at("write", path))
}
