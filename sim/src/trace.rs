//! What happened in a run, line by line, and its digest: two runs of one seed must agree on both.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Takes the lines of one run.
pub(crate) struct Trace {
    hasher: blake3::Hasher,
    lines: u64,
    file: Option<BufWriter<File>>,
}

impl Trace {
    /// Keeps only the digest, or writes the lines to a file as well.
    pub(crate) fn new(path: Option<&Path>) -> io::Result<Self> {
        let file = path.map(File::create).transpose()?.map(BufWriter::new);
        Ok(Trace { hasher: blake3::Hasher::new(), lines: 0, file })
    }

    /// Adds a line.
    pub(crate) fn line(&mut self, now_ms: u64, text: std::fmt::Arguments<'_>) {
        let line = format!("{now_ms} {text}\n");
        self.hasher.update(line.as_bytes());
        self.lines += 1;
        if let Some(file) = &mut self.file {
            // A trace that cannot be written is missed by whoever asked for it, not by the run.
            let _ = file.write_all(line.as_bytes());
        }
    }

    /// How many lines there are, and their digest.
    pub(crate) fn finish(mut self) -> (u64, String) {
        if let Some(file) = &mut self.file {
            let _ = file.flush();
        }
        (self.lines, self.hasher.finalize().to_hex().to_string())
    }
}
