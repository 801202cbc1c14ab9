//! A TCP proxy on loopback whose answers break off or stall where a test wants it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_tests::oci::PushedImage;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Forwards to one server; ends with its handle.
pub(crate) struct FlakyProxy {
    host: String,
    target: String,
    state: Arc<State>,
    acceptor: JoinHandle<()>,
}

struct State {
    /// Bytes of answers that were passed on.
    forwarded: AtomicU64,
    /// Each connection ends after so many bytes of answers.
    break_after: AtomicU64,
    /// Nothing is passed on any more once so many bytes were, over all connections.
    stall_after: AtomicU64,
    healed: Notify,
}

impl FlakyProxy {
    pub(crate) async fn start(target: &str) -> FlakyProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State {
            forwarded: AtomicU64::new(0),
            break_after: AtomicU64::new(u64::MAX),
            stall_after: AtomicU64::new(u64::MAX),
            healed: Notify::new(),
        });
        let acceptor = tokio::spawn({
            let (state, target) = (Arc::clone(&state), target.to_owned());
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let (state, target) = (Arc::clone(&state), target.clone());
                    tokio::spawn(async move { drop(forward(client, &target, &state).await) });
                }
            }
        });
        FlakyProxy { host, target: target.to_owned(), state, acceptor }
    }

    /// The same image, by way of this proxy.
    pub(crate) fn address_of(&self, image: &PushedImage) -> PushedImage {
        let reference = image.reference.replacen(&self.target, &self.host, 1);
        PushedImage { reference, digest: image.digest.clone() }
    }

    pub(crate) fn break_each_connection_after(&self, bytes: u64) {
        self.state.break_after.store(bytes, Ordering::SeqCst);
    }

    pub(crate) fn stall_after(&self, bytes: u64) {
        self.state.stall_after.store(bytes, Ordering::SeqCst);
    }

    pub(crate) fn heal(&self) {
        self.state.break_after.store(u64::MAX, Ordering::SeqCst);
        self.state.stall_after.store(u64::MAX, Ordering::SeqCst);
        self.state.healed.notify_waiters();
    }

    pub(crate) fn forwarded_bytes(&self) -> u64 {
        self.state.forwarded.load(Ordering::SeqCst)
    }
}

impl Drop for FlakyProxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

async fn forward(client: TcpStream, target: &str, state: &State) -> std::io::Result<()> {
    let server = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let requests = async move { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    let answers = async move {
        let mut buffer = vec![0; 16 * 1024];
        let mut here = 0;
        loop {
            let bytes = from_server.read(&mut buffer).await?;
            if bytes == 0 {
                return Ok(());
            }
            if state.forwarded.load(Ordering::SeqCst) + bytes as u64
                > state.stall_after.load(Ordering::SeqCst)
            {
                // Keeps the connection open and silent; after healing it ends, as its peer has long gone.
                state.healed.notified().await;
                return Ok(());
            }
            here += bytes as u64;
            if here > state.break_after.load(Ordering::SeqCst) {
                return Ok(());
            }
            to_client.write_all(&buffer[..bytes]).await?;
            state.forwarded.fetch_add(bytes as u64, Ordering::SeqCst);
        }
    };
    tokio::select! {
        outcome = requests => outcome,
        outcome = answers => outcome,
    }
}
