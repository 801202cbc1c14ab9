//! Pipes for `splice(2)`, pooled: a connection borrows one only while bulk data is under way.
//!
//! A pipe that still holds bytes never goes back into the pool: no byte of one connection can reach another (I9).

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a pipe is asked to hold, in bytes. When the kernel refuses (`pipe-user-pages-soft`) it holds 64 KiB.
pub const PIPE_BYTES: usize = 256 << 10;
/// Pipes that lie idle in the pool at most.
pub const PIPES_IDLE_MAX: usize = 64;
/// Pipes at a time at most; connections beyond them read and write.
pub const PIPES_MAX: usize = 4096;

/// The pool.
#[derive(Debug, Default)]
pub struct PipePool {
    idle: Mutex<Vec<Ends>>,
    lent: AtomicUsize,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

/// A pipe on loan.
#[derive(Debug)]
pub struct Pipe<'a> {
    pool: &'a PipePool,
    /// Present until the pipe is dropped.
    ends: Option<Ends>,
    /// Bytes in the pipe.
    held: usize,
}

impl PipePool {
    /// Lends a pipe, or none when [`PIPES_MAX`] are lent or the process has no descriptor left.
    pub fn lend(&self) -> Option<Pipe<'_>> {
        let lent = self.lent.fetch_add(1, Ordering::Relaxed);
        let ends = if lent < PIPES_MAX { self.idle_or_new() } else { None };
        if ends.is_none() {
            self.lent.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Pipe { pool: self, ends, held: 0 })
    }

    fn idle_or_new(&self) -> Option<Ends> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.or_else(|| {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
            // Only a wish: a smaller pipe moves the same bytes in more calls.
            let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
            Some(Ends { read, write })
        })
    }
}

impl Pipe<'_> {
    /// Bytes in the pipe.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves what `source` has into the pipe, which must be empty: only then does `WouldBlock` speak of the source.
    /// Zero bytes are the source's end.
    ///
    /// # Errors
    /// Those of `splice(2)`; `InvalidInput` when the source cannot be spliced.
    pub fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "a pipe is filled only when it is empty");
        let Some(ends) = &self.ends else { return Ok(0) };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = retry(|| splice(source.as_fd(), None, &ends.write, None, PIPE_BYTES, flags))?;
        self.held += moved;
        Ok(moved)
    }

    /// Moves what the pipe holds, or a part of it, into `sink`.
    ///
    /// # Errors
    /// Those of `splice(2)`; `WouldBlock` when the sink is full.
    pub fn drain(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let Some(ends) = &self.ends else { return Ok(0) };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = retry(|| splice(&ends.read, None, sink.as_fd(), None, self.held, flags))?;
        self.held -= moved;
        Ok(moved)
    }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

impl Drop for Pipe<'_> {
    fn drop(&mut self) {
        self.pool.lent.fetch_sub(1, Ordering::Relaxed);
        let Some(ends) = self.ends.take() else { return };
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if self.held == 0 && idle.len() < PIPES_IDLE_MAX {
            idle.push(ends);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn i09_a_pipe_with_bytes_in_it_is_never_lent_again() {
        let pool = PipePool::default();
        let (mut source, source_end) = UnixStream::pair().unwrap();
        let (mut sink, sink_end) = UnixStream::pair().unwrap();
        source.write_all(b"of one tenant").unwrap();
        let mut pipe = pool.lend().unwrap();
        assert_eq!(pipe.fill(&source_end).unwrap(), 13);
        drop(pipe);
        assert!(pool.idle.lock().unwrap().is_empty());

        source.write_all(b"of another").unwrap();
        let mut pipe = pool.lend().unwrap();
        assert_eq!(
            (pipe.fill(&source_end).unwrap(), pipe.drain(&sink_end).unwrap(), pipe.held()),
            (10, 10, 0)
        );
        drop(pipe);
        assert_eq!(pool.idle.lock().unwrap().len(), 1);
        let mut got = [0; 10];
        sink.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"of another");
        assert_eq!(pool.lent.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn no_more_pipes_than_the_bound_are_lent() {
        let pool = PipePool::default();
        pool.lent.store(PIPES_MAX, Ordering::Relaxed);
        assert!(pool.lend().is_none());
        assert_eq!(pool.lent.load(Ordering::Relaxed), PIPES_MAX);
    }
}
