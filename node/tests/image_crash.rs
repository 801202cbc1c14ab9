//! An agent that dies between any two steps of a pull, of the making of a root, or of a collection, at every one in turn: the
//! next agent goes on from what is sound, believes nothing that is not, and leaves nothing else behind.
//!
//! The agents are processes of their own and end by `kill -9`. Needs what `cargo xtask assets` makes and installs, and root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of single machines")]
mod guest_image;
#[allow(dead_code, reason = "shared with other tests")]
mod namespace;
#[allow(dead_code, reason = "shared with the tests of an outage")]
mod scene;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdfast_model::agent::NodeInstance;
use holdfast_model::resource::Image;
use holdfast_node::image::Digest;
use holdfast_node::step::Step;
use scene::{Scene, until, was_agent};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// An image of one layer.
struct Served {
    manifest: Vec<u8>,
    blobs: BTreeMap<String, Vec<u8>>,
}

impl Served {
    fn of_files(root: &Path) -> Served {
        let mut tar = tar::Builder::new(Vec::new());
        tar.follow_symlinks(false);
        for entry in fs::read_dir(root).unwrap().map(Result::unwrap) {
            tar.append_dir_all(entry.file_name(), entry.path()).unwrap();
        }
        let layer = tar.into_inner().unwrap();
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = serde_json::json!({
            "architecture": arch, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer).to_string()] },
        });
        let config = config.to_string().into_bytes();
        let described = |kind: &str, blob: &[u8]| {
            serde_json::json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": Digest::of(blob).to_string(), "size": blob.len(),
            })
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": described("config.v1+json", &config), "layers": [described("layer.v1.tar", &layer)],
        });
        let blobs = [config, layer].map(|blob| (Digest::of(&blob).to_string(), blob));
        Served { manifest: manifest.to_string().into_bytes(), blobs: blobs.into() }
    }

    /// Serves it on loopback for as long as the test runs.
    fn serve(self) -> Image {
        let digest = Digest::of(&self.manifest).to_string();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap();
        let served = Arc::new(self);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let served = Arc::clone(&served);
                // An agent that dies hangs up.
                std::thread::spawn(move || client.and_then(|client| served.answer(client)).ok());
            }
        });
        Image { repository: format!("{host}/crash"), digest: digest.parse().unwrap() }
    }

    fn answer(&self, client: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(client.try_clone()?).lines();
        let path = lines.next().ok_or(std::io::ErrorKind::UnexpectedEof)??;
        let path = path.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut from = 0;
        for line in lines {
            let line = line?.to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(range) = line.strip_prefix("range: bytes=") {
                from = range.trim_end_matches('-').parse().unwrap();
            }
        }
        let blob = self.blobs.iter().find(|(digest, _)| path.ends_with(digest.as_str()));
        let body = blob.map_or(&self.manifest, |(_, blob)| blob);
        let (kind, size) =
            (if blob.is_some() { "application/octet-stream" } else { MANIFEST_TYPE }, body.len());
        let status = if from == 0 {
            "200 OK".to_owned()
        } else {
            format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{size}", size - 1)
        };
        let mut client = client;
        let length = size - from;
        write!(
            client,
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )?;
        client.write_all(&body[from..])
    }
}

/// Every file below the images' folder with its bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(below) = folders.pop() {
        for entry in fs::read_dir(&below).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(
                    path.strip_prefix(folder).unwrap().to_owned(),
                    fs::read(&path).unwrap_or_default(),
                );
            }
        }
    }
    found
}

struct Stage {
    scene: Scene,
    instance: NodeInstance,
    /// A root that nobody wants any more, by its paths below the images' folder.
    unwanted: BTreeMap<PathBuf, Vec<u8>>,
}

impl Stage {
    fn images(&self) -> PathBuf {
        self.scene.data_dir().join("images")
    }

    /// As before the pull: an older root is there, and nothing else. Machines of the last round are gone.
    fn reset(&mut self) {
        self.scene.wipe();
        fs::remove_dir_all(self.images()).unwrap();
        for (path, bytes) in &self.unwanted {
            let path = self.images().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        self.scene.desire(std::slice::from_ref(&self.instance));
    }

    /// Only the root that is wanted is there: it was pulled, and all else collected.
    fn is_done(&self) -> bool {
        let root = self.instance.image.digest.to_string();
        let root = Path::new("roots").join(root.trim_start_matches("sha256:"));
        let rest = |path: &PathBuf| !path.starts_with(&root) && path != Path::new("lock");
        let files = files(&self.images());
        files.contains_key(&root.join("image.json")) && !files.keys().any(rest)
    }
}

#[test]
fn i05_a_crash_at_any_step_of_a_pull_or_a_collection_leaves_whole_images_alone() {
    const TEST: &str = "i05_a_crash_at_any_step_of_a_pull_or_a_collection_leaves_whole_images_alone";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let scene = Scene::new(TEST);
    let mut instance = scene.instance(1);
    instance.resources.memory_mib = 64;
    instance.image = Served::of_files(&scene.image_files()).serve();
    let mut stage = Stage { unwanted: files(&scene.data_dir().join("images")), scene, instance };
    assert_eq!(stage.unwanted.len(), 4, "the scene's own root");

    stage.reset();
    let agent = stage.scene.agent_that_collects(None);
    until("the image is here and all else is gone", || stage.is_done());
    agent.kill();
    let whole = files(&stage.images());
    let mut points = stage.scene.points();
    points.retain(|point| Step::OF_IMAGES.contains(&point.step));
    let seen: BTreeSet<Step> = points.iter().map(|point| point.step).collect();
    assert_eq!(seen, Step::OF_IMAGES.iter().copied().collect(), "every step of an image was done");

    for point in points {
        stage.reset();
        let mut agent = stage.scene.agent_that_collects(Some(point));
        let crashed = agent.ended_or(|| stage.is_done());
        // How many pieces a blob comes in is chance; every other step comes every time.
        assert!(crashed || point.step == Step::BlobWritten, "it did not come to {point:?}");
        drop(agent);
        // Whatever has the name of a root is whole.
        for (path, bytes) in files(&stage.images()) {
            if path.starts_with("roots") {
                let expected = whole.get(&path).or_else(|| stage.unwanted.get(&path));
                assert_eq!(Some(&bytes), expected, "{} after {point:?}", path.display());
            }
        }
        let agent = stage.scene.agent_that_collects(None);
        until(&format!("the next agent has mended it, after {point:?}"), || stage.is_done());
        agent.kill();
        assert!(files(&stage.images()) == whole, "the same image, to the byte, after {point:?}");
    }
    stage.scene.wipe();
}
