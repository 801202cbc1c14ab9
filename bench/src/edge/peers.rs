//! The three that are compared: how each is configured and started. Each has one thread, on a core of its own, the same
//! backend behind one hostname, and no log of connections.

use crate::Outcome;
use holdfast_bench::process::Process;
use holdfast_client::Replica;
use holdfast_edge::EdgeConfig;
use holdfast_edge::agent::REPLICA_FILE;
use holdfast_edge::process::{Standing, run};
use holdfast_model::agent::{Backend, EdgeRoute, FRAME_ITEMS_MAX, Frame, ProxyProtocol, Stamp};
use holdfast_model::{ClusterId, Incarnation, InstanceId, Revision, RouteId};
use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The name that is asked for.
pub(crate) const HOSTNAME: &str = "bench.example";
/// The core of the proxy; the generator has the other.
const CORE: &str = "0";
/// How long a proxy may take to listen.
const START_MAX: Duration = Duration::from_secs(10);

/// One of those that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Holdfast,
    Haproxy,
    Nginx,
}

impl Peer {
    pub(crate) const ALL: [Self; 3] = [Self::Holdfast, Self::Haproxy, Self::Nginx];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Holdfast => "holdfast",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    /// Starts it in `folder`, which is new; what it listens on leads to `backend`.
    pub(crate) fn start(self, folder: &Path, listens: SocketAddr, backend: SocketAddr) -> Outcome<Process> {
        std::fs::create_dir_all(folder)?;
        let (program, arguments): (PathBuf, Vec<OsString>) = match self {
            Self::Holdfast => {
                fill(&folder.join(REPLICA_FILE), vec![bench_route(listens.port(), backend)?])?;
                (std::env::current_exe()?, vec!["serve".into(), folder.into()])
            }
            Self::Haproxy => {
                let file = folder.join("haproxy.cfg");
                std::fs::write(&file, haproxy(listens, backend))?;
                ("haproxy".into(), vec!["-db".into(), "-f".into(), file.into()])
            }
            Self::Nginx => {
                let file = folder.join("nginx.conf");
                std::fs::write(&file, nginx(folder, listens, backend))?;
                let prefix = folder.into();
                let arguments =
                    vec!["-p".into(), prefix, "-e".into(), "stderr".into(), "-c".into(), file.into()];
                ("/usr/sbin/nginx".into(), arguments)
            }
        };
        let mut pinned: Vec<OsString> = vec!["-c".into(), CORE.into(), program.into()];
        pinned.extend(arguments);
        let mut process = Process::new(self.name(), Path::new("taskset"), pinned, folder.join("log"));
        process.start()?;
        let until = Instant::now() + START_MAX;
        while std::net::TcpStream::connect(listens).is_err() {
            if Instant::now() > until || process.ended().is_some() {
                let log = std::fs::read_to_string(process.log()).unwrap_or_default();
                return Err(format!("{} does not listen on {listens}: {log}", self.name()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }
}

fn haproxy(listens: SocketAddr, backend: SocketAddr) -> String {
    format!(
        "global\n nbthread 1\n maxconn 7000\ndefaults\n mode tcp\n option splice-auto\n timeout connect 5s\n \
         timeout client 1h\n timeout server 1h\nfrontend f\n bind {listens} backlog 4096\n tcp-request inspect-delay 5s\n \
         tcp-request content accept if {{ req.ssl_hello_type 1 }}\n use_backend b if {{ req.ssl_sni -i {HOSTNAME} }}\n\
         backend b\n server s {backend}\n"
    )
}

fn nginx(folder: &Path, listens: SocketAddr, backend: SocketAddr) -> String {
    let folder = folder.display();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser root;\ndaemon off;\nmaster_process off;\n\
         worker_processes 1;\nworker_rlimit_nofile 20000;\nerror_log stderr error;\npid {folder}/pid;\n\
         events {{ worker_connections 19000; }}\nstream {{\n access_log off;\n proxy_timeout 1h;\n \
         map $ssl_preread_server_name $to {{ {HOSTNAME} b; }}\n upstream b {{ server {backend}; }}\n \
         server {{ listen {listens} reuseport backlog=4096; ssl_preread on; proxy_pass $to; }}\n}}\n"
    )
}

pub(crate) fn cluster() -> ClusterId {
    ClusterId::from_bits(1)
}

pub(crate) fn stamp(revision: u64) -> Stamp {
    Stamp { cluster: cluster(), incarnation: Incarnation(0), revision: Revision(revision) }
}

fn bench_route(port: u16, backend: SocketAddr) -> Outcome<EdgeRoute> {
    let IpAddr::V6(address) = backend.ip() else { return Err("the backend has no IPv6 address".into()) };
    let instance = InstanceId::from_bits(1);
    Ok(EdgeRoute {
        id: RouteId::from_bits(1),
        hostname: Some(HOSTNAME.parse()?),
        listen_port: port,
        proxy_protocol: ProxyProtocol::Off,
        backends: vec![Backend { instance, address, port: backend.port(), draining: false }],
    })
}

/// Makes the edge's copy of its routes, as the control plane would have it made.
pub(crate) fn fill(file: &Path, routes: Vec<EdgeRoute>) -> Outcome<()> {
    let mut replica = Replica::open(file, cluster())?;
    let stamp = stamp(1);
    let items = routes.len() as u64;
    replica.begin_stream();
    replica.apply(Frame::SnapshotBegin { stamp, items, confirmed_through: stamp.revision })?;
    let mut left = routes.into_iter().peekable();
    while left.peek().is_some() {
        replica.apply(Frame::SnapshotItems(left.by_ref().take(FRAME_ITEMS_MAX).collect()))?;
    }
    let applied = replica.apply(Frame::SnapshotEnd)?;
    match replica.revision() {
        Some(revision) if revision == stamp.revision => Ok(()),
        _ => Err(format!("the routes were not taken: {applied:?}").into()),
    }
}

/// Runs the edge until this process is ended.
pub(crate) fn serve(folder: PathBuf) -> Outcome<()> {
    let mut config = EdgeConfig::new(folder);
    config.listen = vec![IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (_stop, stopped) = watch::channel(false);
    Ok(runtime.block_on(run(config, cluster(), None, stopped, watch::Sender::new(Standing::Starting)))?)
}
