//! Why a measurement could not be made.

use std::path::PathBuf;

/// Everything that ends a run early.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file or folder could not be used.
    #[error("{path} could not be used; check that it exists and that its disk has room")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("the program {program} could not be started; install it, or name it on the command line")]
    Start {
        /// Which.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program ended in another way than it should.
    #[error("{what} ended with {status}; its log is {log}")]
    Ended {
        /// Which.
        what: String,
        /// How.
        status: String,
        /// Where it says more.
        log: PathBuf,
    },
    /// A connection could not be made or broke.
    #[error("the connection to {address} failed: {why}")]
    Connection {
        /// Where to.
        address: String,
        /// Why.
        why: String,
    },
    /// A system gave another answer than it should.
    #[error("{what}: {why}")]
    Answer {
        /// Of what.
        what: String,
        /// The answer.
        why: String,
    },
    /// A system did not get ready.
    #[error("waited {seconds} s for {what}; its logs say more")]
    Slow {
        /// For what.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// A part of a run took longer than it may.
    #[error("it was given up after {seconds} s; run that part alone, and see where it waits")]
    Late {
        /// How long it was waited for.
        seconds: u64,
    },
    /// Someone asked for an end.
    #[error("it was interrupted; nothing was recorded")]
    Interrupted,
    /// Certificates or TLS could not be set up.
    #[error("TLS could not be set up: {0}")]
    Tls(String),
}

impl BenchError {
    /// The error with its causes, in one line.
    pub fn told(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        text
    }

    /// For `map_err` on what touches a file.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> BenchError {
        let path = path.into();
        move |source| BenchError::File { path, source }
    }
}
