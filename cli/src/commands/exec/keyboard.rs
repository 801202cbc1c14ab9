//! Standard input: read by a thread of its own, since a read of a terminal or a pipe cannot be waited for otherwise; and
//! a terminal that hands on every key.

use crate::failure::Failure;
use holdfast_model::exec::EXEC_CHUNK_BYTES_MAX;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::Read;
use tokio::sync::mpsc;

/// Pieces of input that were read and not sent yet.
const PIECES_QUEUED_MAX: usize = 4;

/// Standard input.
pub(super) struct Keyboard {
    pieces: mpsc::Receiver<Vec<u8>>,
}

impl Keyboard {
    /// Begins to read. The thread ends with the input, or with the process.
    pub(super) fn start() -> Result<Self, Failure> {
        let (piece, pieces) = mpsc::channel(PIECES_QUEUED_MAX);
        let read = move || {
            let mut stdin = std::io::stdin().lock();
            let mut buffer = vec![0; EXEC_CHUNK_BYTES_MAX];
            // An error ends the input, as its end does.
            while let Ok(bytes @ 1..) = stdin.read(&mut buffer) {
                if piece.blocking_send(buffer[..bytes].to_vec()).is_err() {
                    return;
                }
            }
        };
        let spawned = std::thread::Builder::new().name("stdin".into()).spawn(read);
        spawned.map_err(|e| Failure::Host(format!("Cannot read standard input: {e}.")))?;
        Ok(Self { pieces })
    }

    /// The next piece; `None` at the end of the input.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        self.pieces.recv().await
    }
}

/// As long as it is held, the terminal hands on every key and shows nothing by itself.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    pub(super) fn enter() -> Result<Self, Failure> {
        let failed = |errno: rustix::io::Errno| {
            Failure::Host(format!("The terminal could not be switched ({errno}); use -T to go without one."))
        };
        let before = tcgetattr(rustix::stdio::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no more.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.before);
    }
}
