//! The generator: clients and their backend in one thread, which replay a handshake and do no cryptography.
//!
//! The client's hello is rustls's own for the name. What the backend answers has the size of a server's first flight with
//! one certificate, and means nothing: nobody between looks into it.

use crate::Outcome;
use crate::peers::HOSTNAME;
use hdrhistogram::Histogram;
use rustls::client::ClientConnection;
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use std::cell::{Cell, RefCell};
use std::net::{Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{LocalSet, spawn_local};

/// A server's first flight: ServerHello, extensions, one certificate, its signature, Finished.
const FLIGHT_BYTES: usize = 1_500;
/// A client's Finished and a small request; and the answer to it.
const SMALL_BYTES: usize = 200;
/// What is written at a time when there is much.
const CHUNK_BYTES: usize = 64 << 10;
/// After so many turns of tasks the generator looks at its sockets, so that tasks that wait for their time hide no answer.
const EVENT_INTERVAL: u32 = 8;
/// How long anything may take before the part has failed.
const LATE: Duration = Duration::from_secs(20);
/// The greatest latency that is told from a greater one.
const LATENCY_NANOS_MAX: u64 = 60_000_000_000;

/// What a client wants of the backend; the first byte of its second message.
const ECHO: u8 = b'e';
const BULK: u8 = b'b';

/// What was counted in a window of time.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counted {
    pub(crate) units: f64,
    pub(crate) seconds: f64,
}

/// The bytes of a client's hello.
fn hello() -> Outcome<Vec<u8>> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), ServerName::try_from(HOSTNAME)?)?;
    let mut hello = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut hello)?;
    }
    Ok(hello)
}

/// Clients, and their backend, which runs as long as this.
pub(crate) struct Load {
    hello: Rc<Vec<u8>>,
    proxy: SocketAddr,
}

/// Opens the backend, calls `body` with its address, and gives it a generator for the proxy that `body` names.
pub(crate) fn with_backend<T>(
    body: impl AsyncFnOnce(SocketAddr, Box<dyn Fn(SocketAddr) -> Load>) -> Outcome<T>,
) -> Outcome<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().event_interval(EVENT_INTERVAL).build()?;
    LocalSet::new().block_on(&runtime, async {
        let hello = Rc::new(hello()?);
        let socket = TcpSocket::new_v6()?;
        socket.bind((Ipv6Addr::LOCALHOST, 0).into())?;
        let listener = socket.listen(4096)?;
        let address = listener.local_addr()?;
        spawn_local(backend(listener, hello.len()));
        let load = move |proxy| Load { hello: Rc::clone(&hello), proxy };
        body(address, Box::new(load)).await
    })
}

async fn backend(listener: TcpListener, hello_bytes: usize) {
    while let Ok((stream, _)) = listener.accept().await {
        // A client or probe that leaves early is the client's to notice.
        spawn_local(async move { answer(stream, hello_bytes).await });
    }
}

async fn answer(mut stream: TcpStream, hello_bytes: usize) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut hello = vec![0; hello_bytes];
    stream.read_exact(&mut hello).await?;
    drop(hello);
    stream.write_all(&[7; FLIGHT_BYTES]).await?;
    let mut small = [0; SMALL_BYTES];
    stream.read_exact(&mut small).await?;
    if small[0] == BULK {
        let chunk = vec![7; CHUNK_BYTES];
        loop {
            stream.write_all(&chunk).await?;
        }
    }
    loop {
        stream.write_all(&small).await?;
        stream.read_exact(&mut small).await?;
    }
}

impl Load {
    /// The same for another proxy.
    pub(crate) fn through(&self, proxy: SocketAddr) -> Self {
        Self { hello: Rc::clone(&self.hello), proxy }
    }

    /// A connection through the proxy, after its handshake.
    async fn open(&self, wanted: u8) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.proxy).await?;
        stream.set_nodelay(true)?;
        stream.write_all(&self.hello).await?;
        stream.read_exact(&mut [0; FLIGHT_BYTES]).await?;
        stream.write_all(&[wanted; SMALL_BYTES]).await?;
        if wanted == ECHO {
            stream.read_exact(&mut [0; SMALL_BYTES]).await?;
        }
        Ok(stream)
    }

    /// `clients` that each come, exchange, leave and come again; what is counted are connections.
    pub(crate) async fn connections(&self, clients: usize, window: Duration) -> Outcome<Counted> {
        self.closed(clients, window, async |count| {
            let mut stream = self.open(ECHO).await?;
            stream.shutdown().await?;
            stream.read_to_end(&mut Vec::new()).await?;
            count.set(count.get() + 1.0);
            Ok(())
        })
        .await
    }

    /// `clients` that each ask again and again on their connection; what is counted are exchanges.
    pub(crate) async fn exchanges(&self, clients: usize, window: Duration) -> Outcome<Counted> {
        self.closed(clients, window, async |count| {
            let mut stream = self.open(ECHO).await?;
            loop {
                stream.write_all(&[ECHO; SMALL_BYTES]).await?;
                stream.read_exact(&mut [0; SMALL_BYTES]).await?;
                count.set(count.get() + 1.0);
            }
        })
        .await
    }

    /// `clients` that each get as much as they can; what is counted are MiB.
    pub(crate) async fn bulk(&self, clients: usize, window: Duration) -> Outcome<Counted> {
        self.closed(clients, window, async |count| {
            let mut stream = self.open(BULK).await?;
            let mut buffer = vec![0; CHUNK_BYTES];
            loop {
                let read = stream.read(&mut buffer).await?;
                if read == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                count.set(count.get() + read as f64 / f64::from(1 << 20));
            }
        })
        .await
    }

    /// Repeats `one` for each client until the time is over; any failure fails the part.
    async fn closed(
        &self,
        clients: usize,
        window: Duration,
        one: impl AsyncFn(&Cell<f64>) -> std::io::Result<()>,
    ) -> Outcome<Counted> {
        let count = Cell::new(0.0);
        let again = async || -> std::io::Result<()> {
            loop {
                one(&count).await?;
            }
        };
        let all = futures::future::try_join_all((0..clients).map(|_| again()));
        let began = Instant::now();
        tokio::select! {
            failed = all => { failed?; }
            () = tokio::time::sleep(window) => {}
        }
        Ok(Counted { units: count.get(), seconds: began.elapsed().as_secs_f64() })
    }

    /// Asks `rate` times a second over `clients` connections, at fixed times; the latency of each counts from when it was
    /// due, in nanoseconds.
    pub(crate) async fn latencies(
        &self,
        clients: usize,
        rate: f64,
        window: Duration,
    ) -> Outcome<Histogram<u64>> {
        let latencies = RefCell::new(Histogram::new_with_bounds(1, LATENCY_NANOS_MAX, 3)?);
        let interval = Duration::from_secs_f64(clients as f64 / rate);
        let mut streams = Vec::new();
        for _ in 0..clients {
            streams.push(self.open(ECHO).await?);
        }
        let began = Instant::now() + interval;
        let one = async |nth: usize, mut stream: TcpStream| -> std::io::Result<()> {
            let mut due = began + interval.mul_f64(nth as f64 / clients as f64);
            while due < began + window {
                // Timers are too coarse by far; the generator has its core to itself.
                while Instant::now() < due {
                    tokio::task::yield_now().await;
                }
                stream.write_all(&[ECHO; SMALL_BYTES]).await?;
                stream.read_exact(&mut [0; SMALL_BYTES]).await?;
                let nanos = u64::try_from(due.elapsed().as_nanos()).unwrap_or(u64::MAX);
                latencies.borrow_mut().saturating_record(nanos);
                due += interval;
            }
            Ok(())
        };
        let all = streams.into_iter().enumerate().map(|(nth, stream)| one(nth, stream));
        tokio::time::timeout(window + LATE, futures::future::try_join_all(all)).await??;
        Ok(latencies.into_inner())
    }

    /// So many connections that are open after their handshake and say nothing.
    pub(crate) async fn idle(&self, connections: usize) -> Outcome<Vec<TcpStream>> {
        let open = async {
            let mut streams = Vec::with_capacity(connections);
            for _ in 0..connections {
                streams.push(self.open(ECHO).await?);
            }
            Ok::<_, std::io::Error>(streams)
        };
        Ok(tokio::time::timeout(LATE, open).await??)
    }
}
