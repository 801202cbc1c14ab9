//! What a program needs in order to be loaded: its interpreter and its libraries.
//!
//! The loader is asked itself (`ld.so --list`), so that the answer is what it will do. That runs none of the program.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The loader's own list of where libraries are.
const CACHE: &str = "/etc/ld.so.cache";

/// The most bytes of a program's header and of a loader's answer that are read.
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADERS_MAX: u16 = 64;
const ANSWER_BYTES_MAX: usize = 256 * 1024;
const INTERPRETER_BYTES_MAX: u64 = 256;

/// Type of the program header that names the interpreter.
const PT_INTERP: u32 = 3;

/// What belongs to a program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// The loader; `None` for a program that is linked statically.
    pub interpreter: Option<PathBuf>,
    /// Libraries, each at the path at which the loader looks for it.
    pub libraries: BTreeSet<PathBuf>,
    /// Where the loader looks first.
    pub cache: Option<PathBuf>,
}

/// Why it is not known what a program needs.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The program could not be read.
    #[error("The program '{}' could not be read.", .path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no program of this machine's.
    #[error("'{}' is not a 64-bit ELF program.", .path.display())]
    Form {
        /// Which one.
        path: PathBuf,
    },
    /// The loader could not be asked.
    #[error("'{}' could not be asked which libraries '{}' needs.", .loader.display(), .path.display())]
    Loader {
        /// The loader.
        loader: PathBuf,
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something is missing.
    #[error("'{}' cannot be loaded: {said}", .path.display())]
    Missing {
        /// The program.
        path: PathBuf,
        /// The loader's words.
        said: String,
    },
}

/// Finds what a program, and the modules that it loads later, need.
pub fn needs(program: &Path, modules: &[PathBuf]) -> Result<Needs, ProgramError> {
    let Some(interpreter) = interpreter(program)? else { return Ok(Needs::default()) };
    let mut libraries = BTreeSet::new();
    for path in std::iter::once(program).chain(modules.iter().map(PathBuf::as_path)) {
        libraries.extend(list(&interpreter, path)?);
    }
    libraries.remove(&interpreter);
    let cache = Some(PathBuf::from(CACHE)).filter(|cache| cache.is_file());
    Ok(Needs { interpreter: Some(interpreter), libraries, cache })
}

fn interpreter(program: &Path) -> Result<Option<PathBuf>, ProgramError> {
    let read = |source| ProgramError::Read { path: program.to_owned(), source };
    let form = || ProgramError::Form { path: program.to_owned() };
    let file = File::open(program).map_err(read)?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).map_err(read)?;
    // Magic, 64 bits, little-endian.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Err(form());
    }
    let long = |bytes: &[u8], at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let short = |bytes: &[u8], at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes);
    let (Some(offset), Some(size), Some(count)) = (long(&header, 32), short(&header, 54), short(&header, 56))
    else {
        return Err(form());
    };
    for n in 0..u64::from(count.min(PROGRAM_HEADERS_MAX)) {
        let mut entry = [0; 56];
        let at = offset.checked_add(n * u64::from(size)).ok_or_else(form)?;
        file.read_exact_at(&mut entry, at).map_err(read)?;
        let kind = entry.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        if kind != Some(PT_INTERP) {
            continue;
        }
        let (Some(at), Some(length)) = (long(&entry, 8), long(&entry, 32)) else { return Err(form()) };
        let mut text = vec![0; usize::try_from(length.min(INTERPRETER_BYTES_MAX)).unwrap_or_default()];
        file.read_exact_at(&mut text, at).map_err(read)?;
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let path = PathBuf::from(std::str::from_utf8(text).map_err(|_| form())?);
        return if path.is_absolute() { Ok(Some(path)) } else { Err(form()) };
    }
    Ok(None)
}

fn list(loader: &Path, program: &Path) -> Result<Vec<PathBuf>, ProgramError> {
    let error = |source| ProgramError::Loader { loader: loader.to_owned(), path: program.to_owned(), source };
    let output = Command::new(loader).arg("--list").arg(program).env_clear().output().map_err(error)?;
    let mut text = String::new();
    output.stdout.take(ANSWER_BYTES_MAX as u64).read_to_string(&mut text).map_err(error)?;
    if !output.status.success() || text.contains("not found") {
        let said = format!("{}{text}", String::from_utf8_lossy(&output.stderr));
        return Err(ProgramError::Missing {
            path: program.to_owned(),
            said: said.trim().replace('\n', "; "),
        });
    }
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)`; what the kernel
    // itself gives has no path.
    let path = |line: &str| {
        let path = line.split("=> ").last()?.trim().split(" (").next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    Ok(text.lines().filter_map(path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_needs_its_loader_and_its_c_library() {
        let needs = needs(&std::env::current_exe().unwrap(), &[]).unwrap();
        let interpreter = needs.interpreter.unwrap();
        assert!(interpreter.is_file(), "{}", interpreter.display());
        assert!(!needs.libraries.contains(&interpreter));
        assert!(needs.libraries.iter().any(|path| path.ends_with("libc.so.6")), "{:?}", needs.libraries);
        assert!(needs.libraries.iter().all(|path| path.is_absolute() && path.is_file()));
    }

    #[test]
    fn i14_what_is_no_program_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("program");
        for garbage in [&b"#!/bin/sh\n"[..], b"\x7fELF\x01\x01", &[0; 200]] {
            std::fs::write(&file, garbage).unwrap();
            assert!(needs(&file, &[]).is_err());
        }
        let mut absurd = [0xff; 64];
        absurd[..6].copy_from_slice(b"\x7fELF\x02\x01");
        std::fs::write(&file, absurd).unwrap();
        assert!(needs(&file, &[]).is_err());
    }
}
