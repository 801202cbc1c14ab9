//! The network between the hosts: connections, who listens, what arrives when.
//!
//! It never loses or changes a byte in the middle of a frame; that the transport survives that is tested elsewhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use holdfast_client::{ByteStream, Dial, Dialled, Endpoint, TransportError};
use holdfast_identity::PeerIdentity;
use holdfast_raft::{Handshake, Link, LinkError, PeerStream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::happened::{self, Happened};
use crate::pipe::{Met, Pipe, Read};
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
    listeners: BTreeMap<(u64, Port), Listener>,
}

/// What a host listens for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Port {
    Raft,
    Api,
}

#[derive(Default)]
struct Listener {
    dialled: VecDeque<Accepted>,
    waker: Option<Waker>,
}

/// A connection whose handshake is done.
struct Accepted {
    from: u64,
    /// Whom the dialler's certificate names, if it has one.
    certificate: Option<PeerIdentity>,
    end: End,
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

    /// Where a member is asked by agents.
    pub(crate) fn api_port(&self, host: u64) -> ApiPort {
        ApiPort { network: self.clone(), host }
    }

    /// What an agent dials members through, with a certificate that names it.
    pub(crate) fn agent_dial(&self, host: u64, certificate: PeerIdentity) -> Arc<dyn Dial> {
        Arc::new(AgentDial { network: self.clone(), host, certificate })
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
        for port in [Port::Raft, Port::Api] {
            state.listeners.insert((host, port), Listener::default());
        }
    }

    /// A host is gone: its kernel closes its connections, or, without power, nobody says anything.
    pub(crate) fn go_down(&self, host: u64, silent: bool) {
        let gone = {
            let state = &mut *self.state();
            state.up.remove(&host);
            for pipe in state.pipes.values_mut().filter(|pipe| pipe.from == host || pipe.to == host) {
                pipe.fall_silent();
            }
            [Port::Raft, Port::Api].map(|port| state.listeners.remove(&(host, port)))
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

    /// Adds what befell frames on their way.
    pub(crate) fn count(&self, happened: &mut Happened) {
        for Met { held, late, lost, doubled, overtaken } in self.state().pipes.values().map(|pipe| pipe.met) {
            happened.count(happened::FRAME_HELD, held);
            happened.count(happened::FRAME_LATE, late);
            happened.count(happened::FRAME_LOST, lost);
            happened.count(happened::FRAME_DOUBLED, doubled);
            happened.count(happened::FRAME_OVERTAKEN, overtaken);
        }
    }

    fn connect(&self, from: u64, to: u64, port: Port, certificate: Option<PeerIdentity>) -> Option<End> {
        let (mine, waker) = {
            let state = &mut *self.state();
            let id = state.next_pipe;
            state.next_pipe += 2;
            let listener = state.listeners.get_mut(&(to, port))?;
            let end = |read, write| End { network: self.clone(), read, write };
            listener.dialled.push_back(Accepted { from, certificate, end: end(id, id + 1) });
            let waker = listener.waker.take();
            state.pipes.insert(id, Pipe::new(from, to, port == Port::Raft));
            state.pipes.insert(id + 1, Pipe::new(to, from, port == Port::Raft));
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

impl Network {
    /// Dials for as long as nobody answers; whoever calls bounds the wait.
    async fn dial(
        &self,
        from: u64,
        to: u64,
        port: Port,
        certificate: Option<PeerIdentity>,
    ) -> io::Result<End> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        loop {
            match self.way(from, to) {
                Way::Lost => tokio::time::sleep(DIAL_RETRY).await,
                Way::Refused(latency) => {
                    tokio::time::sleep(latency).await;
                    return Err(refused());
                }
                Way::Open(latency) => {
                    tokio::time::sleep(latency).await;
                    return self.connect(from, to, port, certificate).ok_or_else(refused);
                }
            }
        }
    }

    /// The next connection to a host.
    fn poll_accept(&self, host: u64, port: Port, context: &mut Context<'_>) -> Poll<Accepted> {
        let mut state = self.state();
        let Some(listener) = state.listeners.get_mut(&(host, port)) else { return Poll::Pending };
        match listener.dialled.pop_front() {
            Some(accepted) => Poll::Ready(accepted),
            None => {
                listener.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Where a member is asked by agents.
pub(crate) struct ApiPort {
    network: Network,
    host: u64,
}

impl ApiPort {
    /// The next connection, and whom the dialler's certificate names.
    pub(crate) async fn accept(&self) -> (Option<PeerIdentity>, impl ByteStream + use<>) {
        let next = std::future::poll_fn(|context| self.network.poll_accept(self.host, Port::Api, context));
        let accepted = next.await;
        (accepted.certificate, accepted.end)
    }
}

/// An agent's way into the network.
struct AgentDial {
    network: Network,
    host: u64,
    certificate: PeerIdentity,
}

impl AgentDial {
    async fn to(&self, endpoint: &Endpoint) -> Result<Box<dyn ByteStream>, TransportError> {
        let failed = |source| TransportError::Connect { endpoint: endpoint.to_string(), source };
        // A member's address ends in its id; see [`Network::address`].
        let member = endpoint.host().rsplit('.').next().and_then(|id| id.parse().ok());
        let member = member.ok_or_else(|| failed(io::Error::from(io::ErrorKind::AddrNotAvailable)))?;
        let end = self.network.dial(self.host, member, Port::Api, Some(self.certificate.clone())).await;
        Ok(Box::new(end.map_err(failed)?))
    }
}

impl Dial for AgentDial {
    fn dial<'a>(&'a self, endpoint: &'a Endpoint) -> Dialled<'a> {
        Box::pin(self.to(endpoint))
    }
}

impl Link for HostLink {
    fn dial<'a>(
        &'a self,
        target: u64,
        address: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<PeerStream, LinkError>> + Send + 'a>> {
        Box::pin(async move {
            let end = self.network.dial(self.host, target, Port::Raft, None).await;
            let end = end.map_err(|source| LinkError::Connect { address: address.to_owned(), source })?;
            Ok(PeerStream { peer: target, io: Box::new(end) })
        })
    }

    fn accept(&self) -> Pin<Box<dyn Future<Output = Result<Handshake, LinkError>> + Send + '_>> {
        Box::pin(std::future::poll_fn(move |context| {
            self.network.poll_accept(self.host, Port::Raft, context).map(|Accepted { from, end, .. }| {
                let stream = PeerStream { peer: from, io: Box::new(end) };
                let handshake: Handshake = Box::pin(std::future::ready(Ok(stream)));
                Ok(handshake)
            })
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
