//! Carries a connection: both directions at once, until both have ended.
//!
//! Small exchanges are read and written through one scratch buffer per thread; as soon as a read fills it, the
//! direction moves bulk by `splice(2)` through a borrowed pipe, and falls back when there is none. A direction holds
//! at most one scratch buffer or one pipe of unsent bytes, and reads no more before they are gone: a slow sink slows
//! its source. An idle connection holds no buffer at all.
//!
//! How one side ends the other learns: a FIN as a FIN, with the other direction left open; a reset as a reset. Not a
//! byte is changed, and none is added but what `first` says.

use crate::metrics::Metrics;
use crate::pipe::PipePool;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::Instant;

/// The scratch buffer of a thread, and so the most that a direction holds without a pipe, in bytes.
pub const SCRATCH_BYTES: usize = 16 << 10;
/// Pipes filled in a row before other connections get their turn.
pub const BURST_PIPES_MAX: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// What every relayed connection shares.
#[derive(Debug)]
pub struct Relay {
    /// How long nothing may move.
    pub idle: Duration,
    /// The same, once one side has finished sending.
    pub idle_half_closed: Duration,
    /// Whether bulk may be spliced.
    pub zero_copy: bool,
    /// Where pipes come from.
    pub pipes: PipePool,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Both sides finished sending.
    Closed,
    /// One side broke off; the other was reset.
    Reset,
    /// Nothing moved for too long; both sides were reset.
    Idle,
}

/// How one direction ended.
#[derive(Debug)]
enum Finish {
    /// Its source finished; its sink was told.
    End,
    /// Its source broke off.
    SourceFailed,
    /// Its sink takes no more.
    SinkFailed,
}

/// One direction.
struct Direction<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    flow: Flow<'a>,
}

/// What a direction reports to.
#[derive(Clone, Copy)]
struct Flow<'a> {
    relay: &'a Relay,
    metrics: &'a Metrics,
    moved: &'a crate::metrics::Counter,
    activity: &'a Activity,
}

/// When a byte last moved.
struct Activity {
    began: Instant,
    last_ms: AtomicU64,
}

impl Activity {
    fn note(&self) {
        let now_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Returns once nothing has moved for `limit`.
    async fn idle_for(&self, limit: Duration) {
        loop {
            let deadline = self.began + Duration::from_millis(self.last_ms.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

impl Relay {
    /// Carries `client` and `backend` to their end, after sending `first` to the backend.
    pub async fn run(
        &self,
        mut client: TcpStream,
        mut backend: TcpStream,
        first: Vec<u8>,
        metrics: &Metrics,
    ) -> Ending {
        let ending = self.carry(&mut client, &mut backend, first, metrics).await;
        if ending != Ending::Closed {
            // Closing with a linger of zero sends RST, where a plain close would pretend an orderly end.
            for side in [&client, &backend] {
                if let Err(error) = side.set_zero_linger() {
                    tracing::debug!(%error, "cannot reset a connection; closing it");
                }
            }
        }
        ending
    }

    async fn carry(
        &self,
        client: &mut TcpStream,
        backend: &mut TcpStream,
        first: Vec<u8>,
        metrics: &Metrics,
    ) -> Ending {
        let activity = Activity { began: Instant::now(), last_ms: AtomicU64::new(0) };
        let (from_client, to_client) = client.split();
        let (from_backend, to_backend) = backend.split();
        let flow = |moved| Flow { relay: self, metrics, moved, activity: &activity };
        let up = Direction { from: from_client, to: to_backend, flow: flow(&metrics.bytes_to_backends) };
        let down = Direction { from: from_backend, to: to_client, flow: flow(&metrics.bytes_to_clients) };
        let mut up = pin!(up.run(first));
        let mut down = pin!(down.run(Vec::new()));
        let ((finish, source), other) = tokio::select! {
            ended = &mut up => (ended, down),
            ended = &mut down => (ended, up),
            () = activity.idle_for(self.idle) => return Ending::Idle,
        };
        let rest = async {
            tokio::select! {
                (finish, _) = other => Some(finish),
                // The side that finished sending can still break off, which nothing else would notice while the
                // other side is silent.
                () = broken(source.as_ref()), if matches!(finish, Finish::End) => Some(Finish::SourceFailed),
                () = activity.idle_for(self.idle_half_closed) => None,
            }
        };
        match finish {
            Finish::SourceFailed => Ending::Reset,
            // The sink is gone, but what it sent before can still be read, and belongs to the other side.
            Finish::SinkFailed => {
                rest.await;
                Ending::Reset
            }
            Finish::End => match rest.await {
                Some(Finish::End) => Ending::Closed,
                Some(Finish::SourceFailed | Finish::SinkFailed) => Ending::Reset,
                None => Ending::Idle,
            },
        }
    }
}

/// Returns when the connection has failed, although nobody reads it.
async fn broken(stream: &TcpStream) {
    if stream.ready(Interest::ERROR).await.is_err() {
        tracing::debug!("the runtime is stopping; ending a connection");
    }
}

impl<'a> Direction<'a> {
    /// Moves `first`, then all that the source sends; gives the source back to be watched.
    async fn run(mut self, first: Vec<u8>) -> (Finish, ReadHalf<'a>) {
        let finish = match self.pump(first).await {
            Ok(()) => match self.to.shutdown().await {
                Ok(()) => Finish::End,
                Err(_) => Finish::SinkFailed,
            },
            Err(finish) => finish,
        };
        (finish, self.from)
    }

    async fn pump(&mut self, first: Vec<u8>) -> Result<(), Finish> {
        self.write_rest(first).await?;
        let mut bulk = false;
        loop {
            if bulk {
                self.from.readable().await.map_err(|_| Finish::SourceFailed)?;
                match self.splice_burst().await? {
                    Burst::End => return Ok(()),
                    Burst::Moved(bytes) => {
                        bulk = bytes >= SCRATCH_BYTES;
                        continue;
                    }
                    Burst::Unavailable => {}
                }
            }
            let (read, rest) = poll_fn(|cx| self.poll_copy(cx)).await?;
            if read == 0 {
                return Ok(());
            }
            self.write_rest(rest).await?;
            bulk = self.flow.relay.zero_copy && read == SCRATCH_BYTES;
        }
    }

    /// Reads once into the thread's scratch buffer and writes at once what the sink takes; the rest is returned.
    fn poll_copy(&mut self, cx: &mut Context<'_>) -> Poll<Result<(usize, Vec<u8>), Finish>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.from).poll_read(cx, &mut buffer)).map_err(|_| Finish::SourceFailed)?;
            let read = buffer.filled();
            if read.is_empty() {
                return Poll::Ready(Ok((0, Vec::new())));
            }
            self.flow.activity.note();
            let written = match self.to.try_write(read) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => return Poll::Ready(Err(Finish::SinkFailed)),
            };
            self.flow.moved.add(written as u64);
            Poll::Ready(Ok((read.len(), read[written..].to_vec())))
        })
    }

    async fn write_rest(&mut self, rest: Vec<u8>) -> Result<(), Finish> {
        let mut left = rest.as_slice();
        while !left.is_empty() {
            match self.to.write(left).await {
                Ok(written) if written > 0 => {
                    left = &left[written..];
                    self.flow.moved.add(written as u64);
                    self.flow.activity.note();
                }
                _ => return Err(Finish::SinkFailed),
            }
        }
        Ok(())
    }

    /// Moves pipe after pipe until the source has no more for now.
    async fn splice_burst(&mut self) -> Result<Burst, Finish> {
        let Some(mut pipe) = self.flow.relay.pipes.lend() else { return Ok(Burst::Unavailable) };
        let mut moved = 0;
        for _ in 0..BURST_PIPES_MAX {
            let (from, to): (&TcpStream, &TcpStream) = (self.from.as_ref(), self.to.as_ref());
            match from.try_io(Interest::READABLE, || pipe.fill(from)) {
                Ok(0) => return Ok(Burst::End),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Burst::Moved(moved)),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(Burst::Unavailable),
                Err(_) => return Err(Finish::SourceFailed),
            }
            while pipe.held() > 0 {
                match to.try_io(Interest::WRITABLE, || pipe.drain(to)) {
                    Ok(bytes) if bytes > 0 => {
                        moved += bytes;
                        self.flow.moved.add(bytes as u64);
                        self.flow.metrics.bytes_spliced.add(bytes as u64);
                        self.flow.activity.note();
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        to.writable().await.map_err(|_| Finish::SinkFailed)?;
                    }
                    _ => return Err(Finish::SinkFailed),
                }
            }
        }
        tokio::task::yield_now().await;
        Ok(Burst::Moved(moved))
    }
}

/// What a burst of splices did.
enum Burst {
    /// Moved so many bytes; the source is open.
    Moved(usize),
    /// The source ended.
    End,
    /// There is no pipe, or the kernel does not splice these.
    Unavailable,
}
