//! The network between the hosts: connections, who listens, what arrives when.
//!
//! It never loses or changes a byte in the middle of a frame; that the transport survives that is tested elsewhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use holdfast_raft::{Handshake, Link, LinkError, PeerStream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::pipe::{Pipe, Read};
use crate::weather::{Blocked, Weather};

/// How often an unanswered dial is tried again while nothing answers.
const DIAL_RETRY: Duration = Duration::from_millis(200);

/// The network. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Network(Arc<Mutex<State>>);

struct State {
    now_ms: u64,
    rng: StdRng,
    weather: Weather,
    blocked: Blocked,
    up: BTreeSet<u64>,
    next_pipe: u64,
    pipes: BTreeMap<u64, Pipe>,
    arrivals: BTreeSet<(u64, u64)>,
    listeners: BTreeMap<u64, Listener>,
}

#[derive(Default)]
struct Listener {
    dialled: VecDeque<(u64, End)>,
    waker: Option<Waker>,
}

/// A frame that arrived, for the trace.
pub(crate) struct Arrived {
    pub(crate) pipe: u64,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: usize,
    pub(crate) sum: u64,
}

impl Network {
    pub(crate) fn new(seed: u64) -> Self {
        Network(Arc::new(Mutex::new(State {
            now_ms: 0,
            rng: StdRng::seed_from_u64(seed),
            weather: Weather::CALM,
            blocked: Blocked::new(),
            up: BTreeSet::new(),
            next_pipe: 0,
            pipes: BTreeMap::new(),
            arrivals: BTreeSet::new(),
            listeners: BTreeMap::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a host's listener.
    pub(crate) fn address(host: u64) -> std::net::SocketAddr {
        std::net::SocketAddr::from(([10, 0, 0, host as u8], 7000))
    }

    /// What a member uses it through.
    pub(crate) fn link(&self, host: u64) -> Arc<dyn Link> {
        Arc::new(HostLink { network: self.clone(), host })
    }

    /// Another weather from now on.
    pub(crate) fn set_weather(&self, weather: Weather) {
        self.state().weather = weather;
    }

    /// Another partition from now on. What was held on a path that opens is sent again by its sender.
    pub(crate) fn set_blocked(&self, blocked: Blocked) {
        let state = &mut *self.state();
        let opened: BTreeSet<(u64, u64)> = state.blocked.difference(&blocked).copied().collect();
        state.blocked = blocked;
        for (id, pipe) in &mut state.pipes {
            if opened.contains(&(pipe.from, pipe.to)) {
                let due = pipe.release(state.now_ms, &mut state.rng);
                state.arrivals.extend(due.into_iter().map(|due| (due, *id)));
            }
        }
    }

    /// A host is there.
    pub(crate) fn come_up(&self, host: u64) {
        // The peers of connections from before learn now, at the latest, that they are gone.
        self.break_connections(host);
        let mut state = self.state();
        state.up.insert(host);
        state.listeners.insert(host, Listener::default());
    }

    /// A host is gone: its kernel closes its connections, or, without power, nobody says anything.
    pub(crate) fn go_down(&self, host: u64, silent: bool) {
        let gone = {
            let state = &mut *self.state();
            state.up.remove(&host);
            for pipe in state.pipes.values_mut().filter(|pipe| pipe.from == host || pipe.to == host) {
                pipe.fall_silent();
            }
            state.listeners.remove(&host)
        };
        drop(gone);
        if !silent {
            self.break_connections(host);
        }
    }

    fn break_connections(&self, host: u64) {
        let mut wakers = Vec::new();
        {
            let mut state = self.state();
            for pipe in state.pipes.values_mut().filter(|pipe| pipe.from == host || pipe.to == host) {
                wakers.extend(pipe.break_off());
            }
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    /// It is this late now: what is due arrives.
    pub(crate) fn advance(&self, now_ms: u64) -> Vec<Arrived> {
        let mut arrived = Vec::new();
        let mut wakers = Vec::new();
        {
            let state = &mut *self.state();
            state.now_ms = now_ms;
            while let Some((due, id)) = state.arrivals.first().copied()
                && due <= now_ms
            {
                state.arrivals.pop_first();
                let Some(pipe) = state.pipes.get_mut(&id) else { continue };
                let (from, to) = (pipe.from, pipe.to);
                let seen = |bytes, sum| arrived.push(Arrived { pipe: id, from, to, bytes, sum });
                if pipe.arrive(now_ms, seen) {
                    wakers.extend(pipe.reader.take());
                }
            }
        }
        wakers.into_iter().for_each(Waker::wake);
        arrived
    }

    fn connect(&self, from: u64, to: u64) -> Option<End> {
        let (mine, waker) = {
            let state = &mut *self.state();
            let id = state.next_pipe;
            state.next_pipe += 2;
            let listener = state.listeners.get_mut(&to)?;
            let end = |read, write| End { network: self.clone(), read, write };
            listener.dialled.push_back((from, end(id, id + 1)));
            let waker = listener.waker.take();
            state.pipes.insert(id, Pipe::new(from, to));
            state.pipes.insert(id + 1, Pipe::new(to, from));
            (end(id + 1, id), waker)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Some(mine)
    }

    /// Whether a dial gets through, and how long that takes.
    fn way(&self, from: u64, to: u64) -> Way {
        let state = &mut *self.state();
        let latency = state.rng.random_range(state.weather.latency_ms.0..=state.weather.latency_ms.1);
        let latency = Duration::from_millis(1 + 2 * latency);
        if state.blocked.contains(&(from, to)) || state.blocked.contains(&(to, from)) {
            Way::Lost
        } else if state.up.contains(&to) {
            Way::Open(latency)
        } else if state.rng.random_bool(0.5) {
            Way::Refused(latency)
        } else {
            Way::Lost
        }
    }
}

enum Way {
    Open(Duration),
    Refused(Duration),
    Lost,
}

/// One host's way into the network.
struct HostLink {
    network: Network,
    host: u64,
}

impl HostLink {
    async fn dial(&self, target: u64, address: &str) -> Result<PeerStream, LinkError> {
        let refused = || LinkError::Connect {
            address: address.to_owned(),
            source: io::Error::from(io::ErrorKind::ConnectionRefused),
        };
        loop {
            match self.network.way(self.host, target) {
                Way::Lost => tokio::time::sleep(DIAL_RETRY).await,
                Way::Refused(latency) => {
                    tokio::time::sleep(latency).await;
                    return Err(refused());
                }
                Way::Open(latency) => {
                    tokio::time::sleep(latency).await;
                    let end = self.network.connect(self.host, target).ok_or_else(refused)?;
                    return Ok(PeerStream { peer: target, io: Box::new(end) });
                }
            }
        }
    }
}

impl Link for HostLink {
    fn dial<'a>(
        &'a self,
        target: u64,
        address: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<PeerStream, LinkError>> + Send + 'a>> {
        Box::pin(self.dial(target, address))
    }

    fn accept(&self) -> Pin<Box<dyn Future<Output = Result<Handshake, LinkError>> + Send + '_>> {
        Box::pin(std::future::poll_fn(move |context| {
            let mut state = self.network.state();
            let Some(listener) = state.listeners.get_mut(&self.host) else { return Poll::Pending };
            match listener.dialled.pop_front() {
                Some((peer, end)) => {
                    let stream = PeerStream { peer, io: Box::new(end) };
                    let handshake: Handshake = Box::pin(std::future::ready(Ok(stream)));
                    Poll::Ready(Ok(handshake))
                }
                None => {
                    listener.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        }))
    }
}

/// One end of a connection.
struct End {
    network: Network,
    read: u64,
    write: u64,
}

impl End {
    fn end_writing(&self) {
        let state = &mut *self.network.state();
        let Some(pipe) = state.pipes.get_mut(&self.write) else { return };
        let blocked = state.blocked.contains(&(pipe.from, pipe.to));
        let arrivals = pipe.end(state.now_ms, blocked);
        state.arrivals.extend(arrivals.into_iter().map(|due| (due, self.write)));
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.end_writing();
        // Nobody reads any more: whoever writes finds the connection broken, in the end.
        let wakers: Vec<Waker> = {
            let mut state = self.network.state();
            match state.pipes.get_mut(&self.read) {
                Some(pipe) => pipe.break_off().collect(),
                None => Vec::new(),
            }
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let state = &mut *self.network.state();
        let Some(pipe) = state.pipes.get_mut(&self.read) else { return Poll::Ready(Ok(())) };
        match pipe.read(state.now_ms, into) {
            Read::Bytes => {
                if let Some(writer) = pipe.writer.take() {
                    writer.wake();
                }
                Poll::Ready(Ok(()))
            }
            Read::End => Poll::Ready(Ok(())),
            Read::Broken => Poll::Ready(Err(io::Error::from(io::ErrorKind::ConnectionReset))),
            Read::Nothing => {
                pipe.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let state = &mut *self.network.state();
        let Some(pipe) = state.pipes.get_mut(&self.write) else {
            return Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe)));
        };
        if pipe.is_broken() {
            return Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe)));
        }
        if pipe.is_full() {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let blocked = state.blocked.contains(&(pipe.from, pipe.to));
        let arrivals = pipe.write(bytes, state.now_ms, blocked, &state.weather, &mut state.rng);
        state.arrivals.extend(arrivals.into_iter().map(|due| (due, self.write)));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_writing();
        Poll::Ready(Ok(()))
    }
}
