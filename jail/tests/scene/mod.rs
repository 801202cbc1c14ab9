//! A jail in which the intruder runs, and what it is let loose on.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_jail::plan::{
    self, Access, Attack, Descriptor, Device, Filter, Identity, Limits, Namespace, Plan, Profile, Root,
};
use holdfast_jail::{LaunchError, program, start};

/// Nothing here waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// The stand-in and launcher.
const INTRUDER: &str = env!("CARGO_BIN_EXE_jail-intruder");

pub(crate) const THREADS_MAX: u64 = 64;
pub(crate) const FILE_BYTES_MAX: u64 = 64 * 1024;
const DATA_BYTES_MAX: u64 = 64 << 20;
const METADATA: &str = "169.254.169.254:80";
const ABSTRACT: &str = "holdfast-jail-test";
const SHM_KEY: i32 = 0x4846_4a4c;

pub(crate) struct Scene {
    folder: tempfile::TempDir,
    files: Vec<plan::File>,
    victim: Child,
    control_plane: TcpListener,
    _metadata: TcpListener,
    _abstract: UnixListener,
    _neighbour: UnixListener,
    /// Something of the agent's that it forgot to keep from its children.
    _inherited: File,
    runtime: tokio::runtime::Runtime,
}

/// What the intruder said.
#[derive(Debug)]
pub(crate) struct Made(String);

impl Made {
    fn said(&self, what: &str, attempt: &str) -> bool {
        self.0.lines().any(|line| {
            let mut words = line.split(' ');
            words.next() == Some(what) && words.next() == Some(attempt)
        })
    }

    pub(crate) fn tried(&self, attempt: &str) -> bool {
        self.said("tries", attempt)
    }

    pub(crate) fn succeeded(&self, attempt: &str) -> bool {
        self.said("succeeded", attempt)
    }

    pub(crate) fn failed(&self, attempt: &str) -> bool {
        self.said("failed", attempt)
    }

    pub(crate) fn failures(&self) -> usize {
        self.0.lines().filter(|line| line.starts_with("failed ")).count()
    }

    /// Killed at an attempt.
    pub(crate) fn ended_early(&self) -> bool {
        !self.0.lines().any(|line| line == "end")
    }
}

impl Scene {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("hf-jail-").tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["root", "own"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("secret"), "of another tenant").unwrap();
        fs::write(at("private"), "of the agent").unwrap();
        for (name, mode) in [("secret", 0o644), ("private", 0o600), ("own", 0o700), (".", 0o755)] {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        namespace_address();
        // SAFETY: makes a segment that ends with the test's own namespace.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWIPC), 0);
            assert!(libc::shmget(SHM_KEY, 4_096, libc::IPC_CREAT | 0o666) >= 0);
        }
        let address = SocketAddr::from_abstract_name(ABSTRACT).unwrap();
        Self {
            files: files(),
            victim: Command::new("cat").stdin(Stdio::piped()).spawn().unwrap(),
            control_plane: TcpListener::bind("127.0.0.1:0").unwrap(),
            _metadata: TcpListener::bind(METADATA).unwrap(),
            _abstract: UnixListener::bind_addr(&address).unwrap(),
            _neighbour: UnixListener::bind(at("neighbour.sock")).unwrap(),
            _inherited: {
                let file = File::open(at("secret")).unwrap();
                rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
                file
            },
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            folder,
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity { uid: 1_900_000_777, gid: 1_900_000_777 }
    }

    pub(crate) fn root(&self) -> Root {
        Root {
            mount_point: self.folder().join("root"),
            files: self.files.clone(),
            writable: None,
            devices: Vec::new(),
        }
    }

    pub(crate) fn access(&self) -> Access {
        let of = |executable| {
            self.files.iter().filter(move |f| f.executable == executable).map(|f| f.path.clone())
        };
        Access { read: of(false).collect(), execute: of(true).collect(), ..Access::default() }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            file_bytes: Some(FILE_BYTES_MAX),
            descriptors: Some(1_024),
            threads: Some(THREADS_MAX),
            data_bytes: Some(DATA_BYTES_MAX),
        }
    }

    /// No wall at all.
    pub(crate) fn bare(&self) -> Plan {
        Plan {
            version: plan::VERSION,
            name: self.folder().display().to_string(),
            program: INTRUDER.into(),
            arguments: Vec::new(),
            descriptors: vec![Descriptor::Append(self.folder().join("given"))],
            tap: None,
            cgroup: None,
            namespaces: Vec::new(),
            root: None,
            identity: None,
            no_capabilities: false,
            access: None,
            filter: None,
            limits: Limits { file_bytes: None, descriptors: Some(10_000), threads: None, data_bytes: None },
        }
    }

    /// Every wall, as around a VMM.
    pub(crate) fn all(&self) -> Plan {
        Plan {
            namespaces: Namespace::ALL.to_vec(),
            root: Some(self.root()),
            identity: Some(self.identity()),
            no_capabilities: true,
            access: Some(self.access()),
            filter: Some(Filter { profile: Profile::Qemu, attack: Attack::Kill }),
            limits: self.limits(),
            ..self.bare()
        }
    }

    /// Every wall, as around a Firecracker without a network card.
    pub(crate) fn all_for_firecracker(&self) -> Plan {
        let own = self.folder().join("own");
        let Identity { uid, gid } = self.identity();
        std::os::unix::fs::chown(&own, Some(uid), Some(gid)).unwrap();
        let all = self.all();
        Plan {
            root: Some(Root { writable: Some(own.clone()), devices: vec![Device::Urandom], ..self.root() }),
            access: Some(Access {
                sockets: vec![own],
                devices: vec!["/dev/urandom".into()],
                ..self.access()
            }),
            filter: Some(Filter { profile: Profile::Firecracker, attack: Attack::Kill }),
            ..all
        }
    }

    /// Lets the intruder make these attempts, one after the other.
    pub(crate) fn run(&self, plan: &Plan, attempts: &[&str]) -> Made {
        let at = |name: &str| self.folder().join(name).display().to_string();
        let mut plan = plan.clone();
        plan.arguments = vec![
            attempts.join(","),
            format!("secret={}", at("secret")),
            format!("private={}", at("private")),
            format!("folder={}", at("own")),
            format!("neighbour={}", at("neighbour.sock")),
            format!("abstract={ABSTRACT}"),
            format!("victim={}", self.victim.id()),
            format!("control_plane={}", self.control_plane.local_addr().unwrap()),
            format!("metadata={METADATA}"),
            format!("shm={SHM_KEY}"),
            format!("library={}", self.library()),
            format!("file_bytes={FILE_BYTES_MAX}"),
            format!("data_bytes={DATA_BYTES_MAX}"),
            format!("descriptors={}", 3 + plan.descriptors.len()),
        ];
        for name in fs::read_dir(self.folder().join("own")).unwrap() {
            fs::remove_file(name.unwrap().path()).unwrap();
        }
        fs::remove_file(self.folder().join("given")).ok();
        let pid = self.start(&plan).unwrap_or_else(|error| panic!("{error}; {}", self.said()));
        self.wait_until_gone(pid);
        Made(format!("{}{}", self.output(), self.said()))
    }

    fn library(&self) -> std::path::Display<'_> {
        self.files.iter().find(|file| file.path.ends_with("libc.so.6")).unwrap().path.display()
    }

    /// Starts it; answers with its process.
    pub(crate) fn start(&self, plan: &Plan) -> Result<u32, LaunchError> {
        self.runtime.block_on(async {
            let launch = self.launch(plan).await?;
            let pid = launch.pid();
            launch.go().await.map(|()| pid)
        })
    }

    /// Has the jail built, and then forgets about it, as an agent that dies.
    pub(crate) fn start_and_abandon(&self, plan: &Plan) -> u32 {
        self.runtime.block_on(async { self.launch(plan).await.unwrap().pid() })
    }

    async fn launch(&self, plan: &Plan) -> Result<start::Launch, LaunchError> {
        let out = File::create(self.folder().join("out")).unwrap();
        let error = File::create(self.folder().join("err")).unwrap();
        start::launch(Path::new(INTRUDER), plan, out, error).await
    }

    /// What it wrote.
    pub(crate) fn output(&self) -> String {
        fs::read_to_string(self.folder().join("out")).unwrap()
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder().join("err")).unwrap()
    }

    pub(crate) fn kill(&self, pid: u32) {
        let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        self.wait_until_gone(pid);
    }

    pub(crate) fn wait_until_gone(&self, pid: u32) {
        let begun = Instant::now();
        while fs::exists(format!("/proc/{pid}")).unwrap() {
            assert!(begun.elapsed() < PATIENCE, "process {pid} does not end: {}", self.said());
            // The task that waits for the process runs here.
            self.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(2)).await });
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.victim.kill().ok();
        self.victim.wait().ok();
    }
}

/// The metadata service of a cloud, as near as can be.
fn namespace_address() {
    let status =
        Command::new("ip").args(["address", "add", "169.254.169.254/32", "dev", "lo"]).status().unwrap();
    assert!(status.success());
}

fn files() -> Vec<plan::File> {
    let needs = program::needs(Path::new(INTRUDER), &[]).unwrap();
    let code = std::iter::once(PathBuf::from(INTRUDER)).chain(needs.interpreter).chain(needs.libraries);
    let code = code.map(|path| plan::File { path, executable: true });
    code.chain(needs.cache.map(|path| plan::File { path, executable: false })).collect()
}
