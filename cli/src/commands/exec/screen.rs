//! Standard output and error: written by a thread of its own, so that a reader that is slow holds up nothing but what
//! is said to it; and the terminal's kind and size.

use crate::failure::Failure;
use holdfast_model::exec::{EXEC_TERMINAL_KIND_BYTES_MAX, ExecSize};
use std::io::{self, Write};
use tokio::sync::{mpsc, oneshot};

/// Pieces of output that were heard and not written yet.
const PIECES_QUEUED_MAX: usize = 4;

/// A terminal whose size nobody knows.
const SIZE_UNKNOWN: ExecSize = ExecSize { rows: 24, columns: 80 };

enum Piece {
    Out(Vec<u8>),
    Err(Vec<u8>),
}

/// Where output goes.
pub(super) struct Screen {
    pieces: mpsc::Sender<Piece>,
}

impl Screen {
    /// Begins to write. The other half tells when everything was written, once the screen is dropped.
    pub(super) fn start() -> Result<(Self, oneshot::Receiver<io::Result<()>>), Failure> {
        let (pieces, queued) = mpsc::channel(PIECES_QUEUED_MAX);
        let (done, written) = oneshot::channel();
        // Who waits for it may be gone, and the process with it.
        let write = move || drop(done.send(write_all(queued)));
        let spawned = std::thread::Builder::new().name("stdout".into()).spawn(write);
        spawned.map_err(|e| Failure::Host(format!("Cannot write output: {e}.")))?;
        Ok((Self { pieces }, written))
    }

    /// For standard output; false when it is closed.
    pub(super) async fn out(&self, bytes: Vec<u8>) -> bool {
        self.pieces.send(Piece::Out(bytes)).await.is_ok()
    }

    /// For standard error; false when nothing is written any more.
    pub(super) async fn err(&self, bytes: Vec<u8>) -> bool {
        self.pieces.send(Piece::Err(bytes)).await.is_ok()
    }
}

fn write_all(mut queued: mpsc::Receiver<Piece>) -> io::Result<()> {
    let (mut out, mut err) = (io::stdout(), io::stderr());
    while let Some(piece) = queued.blocking_recv() {
        match piece {
            Piece::Out(bytes) => out.write_all(&bytes).and_then(|()| out.flush())?,
            Piece::Err(bytes) => err.write_all(&bytes)?,
        }
    }
    Ok(())
}

/// What `TERM` says, if it can be sent.
pub(super) fn kind() -> String {
    let kind = std::env::var("TERM").unwrap_or_default();
    let fits = kind.len() <= EXEC_TERMINAL_KIND_BYTES_MAX && kind.bytes().all(|byte| byte.is_ascii_graphic());
    if fits && !kind.is_empty() { kind } else { "xterm".into() }
}

/// The terminal's size.
pub(super) fn size() -> ExecSize {
    let known = rustix::termios::tcgetwinsize(rustix::stdio::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(rustix::stdio::stdin()));
    match known {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
            ExecSize { rows: size.ws_row, columns: size.ws_col }
        }
        _ => SIZE_UNKNOWN,
    }
}
