//! Which VMM boots a guest on this host? Found out by booting one, because `/dev/kvm` may open and still not work.
//!
//! The verdict is cached under a fingerprint of everything that it depends on: programs, kernel, init, host kernel.
//! A probe is bounded in time and always kills its machine.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Vm, VmSpec, Vmm, VmmError, VmmKind, channel::GuestChannel, firecracker::Firecracker, jail::Jails,
    process, qemu::Qemu,
};

/// How long a guest may take to say hello on KVM, and then to leave. A working one needs well under a second.
const KVM_DEADLINE: Duration = Duration::from_secs(10);

/// The same where instructions are translated, on a host that is busy.
const TCG_DEADLINE: Duration = Duration::from_secs(60);

/// Memory of a probe guest, in MiB.
const PROBE_MEMORY_MIB: u32 = 128;

/// Where a probe has its machine.
pub(crate) const PROBE_FOLDER: &str = "probe";

/// What a probe's machine is called.
const PROBE_INSTANCE: &str = "probe";

/// The largest cached verdict that is read.
const CACHE_BYTES_MAX: u64 = 64 * 1024;

/// Where the VMMs and the guest's parts are.
#[derive(Debug, Clone)]
pub struct ProbeConfig {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The archive with the guest's init.
    pub initrd: PathBuf,
    /// The node's own folder: holds the cached verdict and, for as long as it takes, a probe's machine.
    pub folder: PathBuf,
    /// Firecracker, if it is to be tried; see [`find_firecracker`].
    pub firecracker: Option<PathBuf>,
    /// QEMU, if it is to be tried; see [`find_qemu`].
    pub qemu: Option<PathBuf>,
    /// What machines run in.
    pub jails: Arc<Jails>,
}

/// What each VMM did, best first; shown by `holdfast status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Of everything that the verdict depends on.
    pub fingerprint: String,
    /// The VMM that is used: the first that boots.
    pub chosen: Option<VmmKind>,
    /// One entry per VMM, in order of preference; those after the first that boots are not tried.
    pub findings: Vec<Finding>,
}

/// What one VMM did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which one.
    pub kind: VmmKind,
    /// Its outcome.
    pub outcome: Outcome,
}

/// How a probe ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// The guest said hello and left when it was told to.
    Boots {
        /// Time from the start to the hello, in milliseconds.
        hello_ms: u64,
    },
    /// The guest did not come up or did not leave.
    Fails {
        /// A sentence.
        reason: String,
    },
    /// There is nothing to try, or a better one boots.
    NotTried {
        /// A sentence.
        reason: String,
    },
}

/// Finds Firecracker: `HOLDFAST_FIRECRACKER`, or `firecracker` on the `PATH`.
pub fn find_firecracker() -> Option<PathBuf> {
    find_program("HOLDFAST_FIRECRACKER", "firecracker")
}

/// Finds QEMU: `HOLDFAST_QEMU`, or `qemu-system-x86_64` on the `PATH`.
pub fn find_qemu() -> Option<PathBuf> {
    find_program("HOLDFAST_QEMU", "qemu-system-x86_64")
}

fn find_program(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(variable) {
        return Some(PathBuf::from(named)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// The best VMM that boots a guest, and how that is known. Uses the cached verdict if nothing that it depends on
/// has changed, and else boots guests, which takes up to two minutes where one hangs.
pub async fn choose(config: &ProbeConfig) -> Result<(Box<dyn Vmm>, Verdict), VmmError> {
    config.jails.check()?;
    clear(config).await?;
    let fingerprint = fingerprint(config)?;
    let verdict = match cached(&config.folder, &fingerprint) {
        Some(verdict) => verdict,
        None => {
            let verdict = probe_all(config, fingerprint).await?;
            store(&config.folder, &verdict)?;
            verdict
        }
    };
    let chosen = candidates(config).into_iter().find_map(|(kind, vmm)| {
        let vmm = vmm.ok()?;
        (Some(kind) == verdict.chosen).then_some(vmm)
    });
    match chosen {
        Some(vmm) => Ok((vmm, verdict)),
        None => Err(VmmError::NoneBoots { verdicts: verdict.to_string() }),
    }
}

/// The cached verdict, whatever it was made of; for `holdfast status`.
pub fn last_verdict(folder: &Path) -> Option<Verdict> {
    let mut text = Vec::new();
    File::open(cache_path(folder)).ok()?.take(CACHE_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, finding) in self.findings.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            match &finding.outcome {
                Outcome::Boots { hello_ms } => {
                    write!(f, "{separator}{} boots in {hello_ms} ms", finding.kind)?;
                }
                Outcome::Fails { reason } => write!(f, "{separator}{} fails ({reason})", finding.kind)?,
                Outcome::NotTried { reason } => {
                    write!(f, "{separator}{} was not tried ({reason})", finding.kind)?;
                }
            }
        }
        Ok(())
    }
}

type Candidate = (VmmKind, Result<Box<dyn Vmm>, &'static str>);

/// Every VMM in order of preference, or why it cannot be tried.
fn candidates(config: &ProbeConfig) -> [Candidate; 3] {
    let kvm = rustix::fs::access("/dev/kvm", rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK)
        .map_err(|_| "/dev/kvm is absent or not accessible");
    let qemu = |kvm: bool| match &config.qemu {
        Some(program) => {
            Ok(Box::new(Qemu { program: program.clone(), kvm, jails: Arc::clone(&config.jails) })
                as Box<dyn Vmm>)
        }
        None => Err("qemu-system-x86_64 is not installed"),
    };
    let firecracker = match &config.firecracker {
        Some(program) => {
            let jails = Arc::clone(&config.jails);
            Ok(Box::new(Firecracker { program: program.clone(), jails }) as Box<dyn Vmm>)
        }
        None => Err("firecracker is not installed"),
    };
    [
        (VmmKind::Firecracker, firecracker.and_then(|vmm| kvm.map(|()| vmm))),
        (VmmKind::QemuKvm, qemu(true).and_then(|vmm| kvm.map(|()| vmm))),
        (VmmKind::QemuTcg, qemu(false)),
    ]
}

async fn probe_all(config: &ProbeConfig, fingerprint: String) -> Result<Verdict, VmmError> {
    let mut verdict = Verdict { fingerprint, chosen: None, findings: Vec::new() };
    for (kind, candidate) in candidates(config) {
        let outcome = match candidate {
            Ok(_) if verdict.chosen.is_some() => {
                Outcome::NotTried { reason: "a better one boots".to_owned() }
            }
            Ok(vmm) => probe_one(config, vmm.as_ref()).await?,
            Err(reason) => Outcome::NotTried { reason: reason.to_owned() },
        };
        tracing::info!(vmm = %kind, ?outcome, "probed a VMM");
        if matches!(outcome, Outcome::Boots { .. }) {
            verdict.chosen = Some(kind);
        }
        verdict.findings.push(Finding { kind, outcome });
    }
    Ok(verdict)
}

/// Boots a guest, waits for its hello, tells it to leave and waits until it has.
async fn probe_one(config: &ProbeConfig, vmm: &dyn Vmm) -> Result<Outcome, VmmError> {
    let folder = config.folder.join(PROBE_FOLDER);
    let spec = VmSpec {
        instance_id: PROBE_INSTANCE.to_owned(),
        folder: folder.clone(),
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        root_image: None,
        memory_mib: PROBE_MEMORY_MIB,
        vcpus: 1,
        cpu_milli: 1_000,
        nic: None,
        volumes: Vec::new(),
    };
    let deadline = if vmm.kind() == VmmKind::QemuTcg { TCG_DEADLINE } else { KVM_DEADLINE };
    let outcome = match vmm.start(&spec).await {
        Ok(vm) => greet_and_stop(&vm, deadline).await,
        Err(error) => Outcome::Fails { reason: with_sources(&error) },
    };
    clear(config).await?;
    Ok(outcome)
}

/// Removes a probe's machine, of this agent or of one that died under it.
async fn clear(config: &ProbeConfig) -> Result<(), VmmError> {
    let folder = config.folder.join(PROBE_FOLDER);
    if let super::Adoption::Running(stale) = Vm::adopt(&folder)? {
        stale.kill().await?;
    }
    config.jails.release(PROBE_INSTANCE)?;
    fs::remove_dir_all(&folder)
        .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
        .map_err(|source| VmmError::File { path: folder, action: "removed", source })
}

async fn greet_and_stop(vm: &Vm, deadline: Duration) -> Outcome {
    let started_at = Instant::now();
    let address = vm.channel();
    let hello = tokio::select! {
        hello = GuestChannel::connect(&address, 0, deadline) => hello,
        end = vm.ended() => return Outcome::Fails { reason: match end {
            Ok(end) => format!("before the guest said hello, {end}; its console said: {}", vm.console_said()),
            Err(error) => with_sources(&error),
        } },
    };
    let channel = match hello {
        Ok(channel) => channel,
        Err(error) => {
            let reason = format!("{} The console said: {}", with_sources(&error), vm.console_said());
            return Outcome::Fails { reason };
        }
    };
    let hello_ms = u64::try_from(started_at.elapsed().as_millis()).unwrap_or(u64::MAX);
    if let Err(error) = channel.sender.stop(Duration::ZERO).await {
        return Outcome::Fails { reason: with_sources(&error) };
    }
    match tokio::time::timeout(deadline, vm.ended()).await {
        Ok(Ok(super::VmEnd::Exited { .. })) => Outcome::Boots { hello_ms },
        Ok(Ok(end)) => Outcome::Fails { reason: format!("the guest did not leave: {end}") },
        Ok(Err(error)) => Outcome::Fails { reason: with_sources(&error) },
        Err(_) => Outcome::Fails { reason: "the guest said hello but did not leave in time".to_owned() },
    }
}

/// A finding outlives the error, so it holds the whole chain.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text} ({error})");
        source = error.source();
    }
    text
}

fn fingerprint(config: &ProbeConfig) -> Result<String, VmmError> {
    let mut hasher = Sha256::new();
    for path in [&config.kernel, &config.initrd] {
        let bytes =
            fs::read(path).map_err(|source| VmmError::File { path: path.clone(), action: "read", source })?;
        hasher.update(&bytes);
    }
    // A program is told by its size and date: hashing tens of megabytes at each start would be slow.
    for (kind, candidate) in candidates(config) {
        hasher.update([kind as u8, u8::from(candidate.is_ok())]);
    }
    for path in config.firecracker.iter().chain(&config.qemu) {
        let meta = fs::metadata(path).map_err(|source| VmmError::File {
            path: path.clone(),
            action: "read",
            source,
        })?;
        hasher.update(path.as_os_str().as_encoded_bytes());
        hasher.update(format!("{} {:?}", meta.len(), meta.modified().ok()));
    }
    hasher.update([u8::from(config.jails.walls())]);
    hasher.update(fs::read("/proc/sys/kernel/osrelease").unwrap_or_default());
    hasher.update(env!("CARGO_PKG_VERSION"));
    let digest = hasher.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn cache_path(folder: &Path) -> PathBuf {
    folder.join("vmm-verdict.json")
}

/// A cached failure is not believed: what was missing may have been repaired.
fn cached(folder: &Path, fingerprint: &str) -> Option<Verdict> {
    last_verdict(folder).filter(|verdict| verdict.fingerprint == fingerprint && verdict.chosen.is_some())
}

fn store(folder: &Path, verdict: &Verdict) -> Result<(), VmmError> {
    let path = cache_path(folder);
    let text = serde_json::to_vec_pretty(verdict)
        .map_err(|source| VmmError::Record { path: path.clone(), source })?;
    process::check_folder_path(folder)?;
    fs::create_dir_all(folder).and_then(|()| fs::write(&path, text)).map_err(|source| VmmError::File {
        path,
        action: "written",
        source,
    })
}
