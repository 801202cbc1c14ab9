//! A small registry over plain HTTP that holds one image and serves its layer badly: it cuts connections, and takes requests
//! for the rest of a blob as a test wants it.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use holdfast_tests::oci::{Layer, LayerFile, PushedImage, RunConfig, config_file, digest_of, manifest_of};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::pulls::noise;

/// How a request for the rest of a blob is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// As it should be.
    Given,
    /// With the whole blob.
    Ignored,
    /// With so many bytes as were asked for, but from the blob's beginning.
    Wrong,
    /// With another part than was asked for, and it says so.
    OtherPart,
    /// With more than there is.
    TooLong,
    /// As impossible.
    Refused,
}

/// See the module. Ends with its handle.
pub(crate) struct MoodyRegistry {
    host: String,
    state: Arc<State>,
    acceptor: JoinHandle<()>,
}

struct State {
    manifest: Bytes,
    config: Bytes,
    layer: Bytes,
    mood: Mutex<Mood>,
}

struct Mood {
    rest: Rest,
    /// How many bytes of the layer each of the next answers gives before the connection is cut; then whole answers.
    cuts: Vec<usize>,
    /// The first byte of each request for the layer.
    asked: Vec<usize>,
}

impl MoodyRegistry {
    /// With a layer of noise of this many bytes. Each of the first answers is cut after so many bytes of the layer.
    pub(crate) async fn start(bytes: usize, rest: Rest, cuts: &[usize]) -> MoodyRegistry {
        let layer = Layer::of_files(&[LayerFile::regular("data", 0o644, noise(9, bytes))]).unwrap();
        let config = config_file(std::slice::from_ref(&layer), &RunConfig::default());
        let manifest = manifest_of(&config, std::slice::from_ref(&layer));
        let mood = Mood { rest, cuts: cuts.to_vec(), asked: Vec::new() };
        let state = Arc::new(State { manifest, config, layer: layer.blob, mood: Mutex::new(mood) });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let serving = Arc::clone(&state);
        let acceptor = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = Arc::clone(&serving);
                tokio::spawn(async move { drop(state.answer(client).await) });
            }
        });
        MoodyRegistry { host, state, acceptor }
    }

    pub(crate) fn image(&self) -> PushedImage {
        let digest = digest_of(&self.state.manifest);
        PushedImage { reference: format!("{}/moody:v1@{digest}", self.host), digest }
    }

    /// From where the layer was asked for, in order.
    pub(crate) fn asked(&self) -> Vec<usize> {
        self.state.mood.lock().unwrap().asked.clone()
    }

    /// Without the algorithm.
    pub(crate) fn layer_digest(&self) -> String {
        digest_of(&self.state.layer)["sha256:".len()..].to_owned()
    }

    pub(crate) fn layer_bytes(&self) -> usize {
        self.state.layer.len()
    }
}

impl Drop for MoodyRegistry {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl State {
    /// One request, one answer.
    async fn answer(&self, mut client: TcpStream) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let from = head.split_once("range: bytes=").and_then(|(_, after)| after.split_once('-'));
        let from: usize = from.map_or(0, |(from, _)| from.parse().unwrap());
        if !path.ends_with(&digest_of(&self.layer)) {
            let document = if path.contains("/manifests/") { &self.manifest } else { &self.config };
            let kind = if path.contains("/manifests/") {
                "application/vnd.oci.image.manifest.v1+json"
            } else {
                "application/octet-stream"
            };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n");
            return send(&mut client, &head, document, document.len()).await;
        }
        let (rest, cut) = {
            let mut mood = self.mood.lock().unwrap();
            mood.asked.push(from);
            let cut = if mood.cuts.is_empty() { usize::MAX } else { mood.cuts.remove(0) };
            (mood.rest, cut)
        };
        let size = self.layer.len();
        let part = |first: usize| {
            format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{}/{size}\r\n", size - 1)
        };
        let whole = "HTTP/1.1 200 OK\r\n".to_owned();
        let (head, body) = match (from, rest) {
            (0, _) | (_, Rest::Ignored) => (whole, self.layer.clone()),
            (_, Rest::Given) => (part(from), self.layer.slice(from..)),
            (_, Rest::Wrong) => (part(from), self.layer.slice(..size - from)),
            (_, Rest::OtherPart) => (part(from - 1), self.layer.slice(from - 1..)),
            (_, Rest::TooLong) => (part(from), self.layer.slice(from - 1..)),
            (_, Rest::Refused) => ("HTTP/1.1 416 Range Not Satisfiable\r\n".to_owned(), Bytes::new()),
        };
        send(&mut client, &head, &body, cut).await
    }
}

/// Announces the whole body and sends so many bytes of it at most.
async fn send(client: &mut TcpStream, head: &str, body: &Bytes, bytes: usize) -> std::io::Result<()> {
    let head = format!("{head}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    client.write_all(head.as_bytes()).await?;
    client.write_all(&body[..bytes.min(body.len())]).await?;
    client.shutdown().await
}
