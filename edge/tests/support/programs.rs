//! Others' programs as peers of the edge: Debian's packages, which `cargo xtask` installs when missing.
//!
//! A program that is missing fails its test: a suite that skips it in silence looks complete.

use super::world::until;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// A program that is ended when this is dropped.
pub(crate) struct Running(Child);

/// Starts `program` and waits until it listens on all of these.
pub(crate) async fn start(program: &str, arguments: &[&str], listens: &[SocketAddr]) -> Running {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let child = command.spawn().unwrap_or_else(|e| panic!("{program}: {e}; `cargo xtask test` installs it"));
    let mut running = Running(child);
    until(async || {
        assert_eq!(running.0.try_wait().unwrap(), None, "{program} {arguments:?} ended");
        for address in listens {
            if TcpStream::connect(address).await.is_err() {
                return false;
            }
        }
        true
    })
    .await;
    running
}

/// HAProxy with this configuration, in the foreground.
pub(crate) async fn haproxy(folder: &Path, configuration: &str, listens: &[SocketAddr]) -> Running {
    let file = folder.join("haproxy.cfg");
    let global =
        "global\n nbthread 1\ndefaults\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n";
    std::fs::write(&file, format!("{global}{configuration}")).unwrap();
    start("haproxy", &["-db", "-f", file.to_str().unwrap()], listens).await
}

/// nginx with this inside its `stream` block, in the foreground as one process.
pub(crate) async fn nginx(folder: &Path, stream: &str, listens: &[SocketAddr]) -> Running {
    let (file, prefix) = (folder.join("nginx.conf"), folder.to_str().unwrap());
    let configuration = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser root;\ndaemon off;\nmaster_process off;\n\
         error_log stderr error;\npid {prefix}/nginx.pid;\nevents {{}}\nstream {{\n{stream}\n}}\n"
    );
    std::fs::write(&file, configuration).unwrap();
    let arguments = ["-p", prefix, "-e", "stderr", "-c", file.to_str().unwrap()];
    start("/usr/sbin/nginx", &arguments, listens).await
}

/// A port on loopback that is free now.
pub(crate) async fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap()
}

/// Runs `program` until `said` has appeared on its output, and ends it then, or until it ends by itself.
pub(crate) async fn listen_to(program: &str, arguments: &[&str], said: &str) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.spawn().unwrap_or_else(|e| panic!("{program}: {e}; `cargo xtask test` installs it"));
    // What it reads stays open: some programs end with their input.
    let (into, mut out) = (child.stdin.take(), child.stdout.take().unwrap());
    let mut stdout = Vec::new();
    let hears = async {
        while !String::from_utf8_lossy(&stdout).contains(said) {
            if out.read_buf(&mut stdout).await.unwrap() == 0 {
                return;
            }
        }
        child.start_kill().unwrap();
    };
    super::world::guarded(hears).await;
    drop(into);
    let rest = super::world::guarded(child.wait_with_output()).await.unwrap();
    Output { stdout, ..rest }
}

/// How a client's bytes are handed on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum How {
    /// As they come.
    AsTheyCome,
    /// One a segment.
    OneByteASegment,
    /// The first record, which is the hello, as records of so many bytes. The hello itself stays what it was, and with it
    /// what both ends hash: records are only how it travels.
    InRecordsOf(usize),
}

/// Stands between a client and `to`: hands on what the client sends, and keeps a copy of what it handed on.
pub(crate) struct Between {
    pub(crate) address: SocketAddr,
    sent: Arc<Mutex<Vec<u8>>>,
}

impl Between {
    pub(crate) async fn start(to: SocketAddr, how: How) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let sent = Arc::new(Mutex::new(Vec::new()));
        let copy = Arc::clone(&sent);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, to, how, Arc::clone(&copy)));
            }
        });
        Self { address, sent }
    }

    /// How many handshake records the client's hello came in: those before its first record of another kind.
    pub(crate) fn hello_records(&self) -> usize {
        let sent = self.sent.lock().unwrap();
        let (mut at, mut records, mut message_left) = (0, 0, None);
        while let Some(record) = sent.get(at..at + 5) {
            if record[0] != 22 || message_left == Some(0) {
                break;
            }
            let body = usize::from(u16::from_be_bytes([record[3], record[4]]));
            let left = message_left.unwrap_or_else(|| {
                4 + usize::from(sent[at + 6]) * 65_536
                    + usize::from(u16::from_be_bytes([sent[at + 7], sent[at + 8]]))
            });
            message_left = Some(left - body);
            (at, records) = (at + 5 + body, records + 1);
        }
        records
    }
}

async fn carry(
    mut client: TcpStream,
    to: SocketAddr,
    how: How,
    copy: Arc<Mutex<Vec<u8>>>,
) -> std::io::Result<()> {
    let mut edge = TcpStream::connect(to).await?;
    edge.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_edge, mut to_edge) = edge.split();
    let up = async {
        let mut hand_on = async |bytes: &[u8]| {
            copy.lock().unwrap().extend_from_slice(bytes);
            to_edge.write_all(bytes).await
        };
        if let How::InRecordsOf(size) = how {
            let mut head = [0; 5];
            from_client.read_exact(&mut head).await?;
            let mut body = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
            from_client.read_exact(&mut body).await?;
            for part in body.chunks(size) {
                let length = u16::try_from(part.len()).unwrap().to_be_bytes();
                hand_on(&[&head[..3], &length, part].concat()).await?;
            }
        }
        let at_a_time = if matches!(how, How::OneByteASegment) { 1 } else { usize::MAX };
        let mut buffer = [0; 4096];
        loop {
            let read = from_client.read(&mut buffer).await?;
            if read == 0 {
                return to_edge.shutdown().await;
            }
            for some in buffer[..read].chunks(at_a_time) {
                hand_on(some).await?;
            }
        }
    };
    let down = async {
        tokio::io::copy(&mut from_edge, &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::try_join!(up, down)?;
    Ok(())
}
