//! The jail of each machine: what its VMM is given, and the order in which its folder, its user id, its cgroup, its
//! process and its record come to be.
//!
//! Back-ends say what a VMM needs ([`Needs`]); nothing else is in its jail. The record of the process is on disk before
//! the VMM's first instruction runs, so an agent that dies anywhere in between leaves either a machine that the next
//! one finds, or none (I5, I7). What a start leaves when it fails (the folder, the claim in it, the cgroup) has names that
//! follow from the instance, and goes with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use holdfast_jail::cgroup::{Choice, Disk, DiskRate, Group, Hierarchy, OVERHEAD_BYTES, PIDS_MAX, Shares};
use holdfast_jail::ids::{CLAIM_FOLDER, IdRange, Ids};
use holdfast_jail::plan::{
    Access, Attack, Descriptor, Device, File, Filter, Limits, Namespace, Plan, Profile, Root, VERSION,
};
use holdfast_jail::program;
use holdfast_jail::start::{Enforced, OWN_BINARY, launch};
use sha2::{Digest, Sha256};

use super::{
    Adoption, DISK_BYTES_PER_SECOND_MAX, DISK_OPERATIONS_PER_SECOND_MAX, Vm, VmSpec, VmmError, VmmKind,
    process,
};
use crate::step::{AfterStep, Step};

/// The folder on which a jail's root is put together.
const ROOT_FOLDER: &str = "root";

/// Descriptors of a VMM.
const DESCRIPTORS_MAX: u64 = 1_024;

/// What a VMM may have of writable private memory beside its guest's: stacks of its threads, mostly untouched. The
/// cgroup counts what is used; this bounds what is asked for, also where there is no cgroup.
const DATA_BYTES_EXTRA: u64 = 2 << 30;

/// How machines are jailed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailConfig {
    /// Whether there are walls. By default where the agent is root; nobody else could put them up.
    pub walls: bool,
    /// Whether each machine has a cgroup.
    pub cgroups: Choice,
    /// The users that VMMs run as.
    pub ids: IdRange,
    /// A program that is the launcher when it is asked to; the agent's own.
    pub launcher: PathBuf,
}

impl Default for JailConfig {
    fn default() -> Self {
        Self {
            walls: rustix::process::geteuid().is_root(),
            cgroups: Choice::default(),
            ids: IdRange::default(),
            launcher: OWN_BINARY.into(),
        }
    }
}

/// The jails of one agent's machines.
pub struct Jails {
    config: JailConfig,
    ids: Ids,
    /// Begins the names of this agent's cgroups.
    mark: String,
    after_step: AfterStep,
    /// What each program needs. It is asked for once: an upgrade of the host's VMM is seen by the next agent.
    known: Mutex<BTreeMap<PathBuf, program::Needs>>,
}

impl std::fmt::Debug for Jails {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jails")
            .field("config", &self.config)
            .field("mark", &self.mark)
            .finish_non_exhaustive()
    }
}

/// What a back-end needs for a machine.
#[derive(Debug)]
pub(crate) struct Needs {
    pub(crate) kind: VmmKind,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// Opened for it, from descriptor 3 on.
    pub(crate) descriptors: Vec<Descriptor>,
    /// Code that it loads when it runs.
    pub(crate) modules: Vec<PathBuf>,
    /// Files that it reads.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) devices: Vec<Device>,
    /// Whether it makes its sockets itself, in the folder [`own_folder`].
    pub(crate) makes_sockets: bool,
    /// A TAP that it opens by its name, which needs the host's network.
    pub(crate) tap: Option<String>,
    pub(crate) profile: Profile,
    /// Names of sockets that a former process may have left.
    pub(crate) stale: Vec<PathBuf>,
}

/// The one folder in which a VMM that makes its sockets itself may do so.
pub(crate) fn own_folder(machine: &Path) -> PathBuf {
    machine.join(CLAIM_FOLDER)
}

impl Jails {
    /// For the agent with this data folder.
    pub fn new(data_dir: &Path, config: JailConfig, after_step: AfterStep) -> Self {
        let digest = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
        let mark = digest.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
        let ids = Ids::new(config.ids, data_dir);
        Self { config, ids, mark, after_step, known: Mutex::default() }
    }

    /// Whether machines are jailed at all.
    pub fn walls(&self) -> bool {
        self.config.walls
    }

    /// Whether this host has every wall that is wanted; if not, which one is missing, and what to do.
    pub fn check(&self) -> Result<(), VmmError> {
        self.hierarchy().map(|_| ())
    }

    /// What is said of the jails to people.
    pub fn describe(&self) -> &'static str {
        match (self.config.walls, self.config.cgroups) {
            (false, _) => "NOT jailed",
            (true, Choice::Required) => "jailed",
            (true, Choice::Without) => "jailed, without cgroups",
        }
    }

    fn hierarchy(&self) -> Result<Option<Hierarchy>, VmmError> {
        match (self.config.walls, self.config.cgroups) {
            (true, Choice::Required) => Ok(Some(Hierarchy::find()?)),
            (false, _) | (true, Choice::Without) => Ok(None),
        }
    }

    fn group_name(&self, instance: &str) -> String {
        format!("{}-{instance}", self.mark)
    }

    /// Removes what a machine that is gone has outside its folder. Blocks for a second at most.
    pub fn release(&self, instance: &str) -> Result<(), VmmError> {
        // Also what was made before the operator chose to run without.
        match Hierarchy::find() {
            Ok(hierarchy) => Ok(hierarchy.group(&self.group_name(instance)).remove()?),
            Err(_) => Ok(()),
        }
    }

    /// The instances of which there is something outside their folders.
    pub fn leftovers(&self) -> BTreeSet<String> {
        let prefix = self.group_name("");
        let names = Hierarchy::find().map(|hierarchy| hierarchy.list(&prefix)).unwrap_or_default();
        names.iter().filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned).collect()
    }

    /// Starts a machine. Fails, and leaves no process, if one runs from its folder already.
    pub(crate) async fn start(&self, spec: &VmSpec, needs: Needs) -> Result<Vm, VmmError> {
        let folder = &spec.folder;
        if let Adoption::Running(vm) = Vm::adopt(folder)? {
            return Err(VmmError::AlreadyRunning { folder: folder.clone(), pid: vm.pid() });
        }
        process::prepare_folder(folder, &needs.stale)?;
        (self.after_step)(Step::FolderMade);
        let (kind, plan) = (needs.kind, self.plan(spec, needs)?);
        let output = |name| process::output_file(folder, name);
        let (stdout, stderr) = (output(process::CONSOLE_FILE)?, output(process::STDERR_FILE)?);
        (self.after_step)(Step::OutputMade);
        let launch = launch(&self.config.launcher, &plan, stdout, stderr).await?;
        if !matches!(launch.access(), Enforced::Fully | Enforced::NotAsked) {
            let enforced = launch.access();
            tracing::warn!(
                ?enforced,
                "this kernel is too old for the whole Landlock wall; VMs run without it"
            );
        }
        (self.after_step)(Step::Launched);
        let ended = || VmmError::EndedAtOnce {
            kind,
            instance_id: spec.instance_id.clone(),
            said: process::said(folder.join(process::STDERR_FILE)),
        };
        let root = spec.root_image.clone();
        let recorded = Vm::record(folder, &spec.instance_id, kind, launch.pid(), plan.cgroup, root)?;
        let vm = recorded.ok_or_else(ended)?;
        (self.after_step)(Step::Recorded);
        launch.go().await?;
        (self.after_step)(Step::Executed);
        Ok(vm)
    }

    fn plan(&self, spec: &VmSpec, needs: Needs) -> Result<Plan, VmmError> {
        let program = needs.program.canonicalize().map_err(|source| VmmError::File {
            path: needs.program.clone(),
            action: "found; install it, or name it in the node's configuration",
            source,
        })?;
        let memory_bytes = u64::from(spec.memory_mib) << 20;
        let mut plan = Plan {
            version: VERSION,
            name: spec.folder.display().to_string(),
            program: program.clone(),
            arguments: needs.arguments,
            descriptors: needs.descriptors,
            tap: None,
            cgroup: None,
            namespaces: Vec::new(),
            root: None,
            identity: None,
            no_capabilities: false,
            access: None,
            filter: None,
            limits: Limits {
                file_bytes: Some(process::FILE_BYTES_MAX),
                descriptors: Some(DESCRIPTORS_MAX),
                // Of its user, who has nothing else; without a user of its own it would be the agent's.
                threads: self.config.walls.then_some(PIDS_MAX),
                data_bytes: Some(memory_bytes + OVERHEAD_BYTES + DATA_BYTES_EXTRA),
            },
        };
        let sockets = own_folder(&spec.folder);
        if !self.config.walls {
            if needs.makes_sockets {
                make_folder(&sockets)?;
            }
            return Ok(plan);
        }
        let loaded = self.loaded(&program, &needs.modules)?;
        let code: BTreeSet<PathBuf> = std::iter::once(program)
            .chain(loaded.interpreter)
            .chain(loaded.libraries)
            .chain(needs.modules)
            .collect();
        let data: BTreeSet<PathBuf> = loaded.cache.into_iter().chain(needs.files).collect();
        let mount_point = spec.folder.join(ROOT_FOLDER);
        make_folder(&mount_point)?;
        plan.identity = Some(self.ids.claim(&spec.folder)?);
        (self.after_step)(Step::IdClaimed);
        if let Some(hierarchy) = self.hierarchy()? {
            let shares = Shares { cpu_milli: spec.cpu_milli, vcpus: spec.vcpus, memory_bytes };
            let group = hierarchy.make(&self.group_name(&spec.instance_id), &shares)?;
            bound_disks(&group, spec, &data)?;
            plan.cgroup = Some(group.folder().to_owned());
            (self.after_step)(Step::GroupMade);
        }
        let file = |executable| move |path: &PathBuf| File { path: path.clone(), executable };
        plan.namespaces = Namespace::ALL.to_vec();
        if needs.tap.is_some() {
            plan.namespaces.retain(|namespace| *namespace != Namespace::Network);
        }
        plan.tap = needs.tap;
        plan.access = Some(Access {
            read: data.iter().cloned().collect(),
            execute: code.iter().cloned().collect(),
            devices: needs.devices.iter().map(|device| Path::new("/dev").join(&*device.name())).collect(),
            sockets: needs.makes_sockets.then(|| sockets.clone()).into_iter().collect(),
        });
        plan.root = Some(Root {
            mount_point,
            files: code.iter().map(file(true)).chain(data.iter().map(file(false))).collect(),
            writable: needs.makes_sockets.then_some(sockets),
            devices: needs.devices,
        });
        plan.no_capabilities = true;
        plan.filter = Some(Filter { profile: needs.profile, attack: Attack::Kill });
        Ok(plan)
    }

    fn loaded(&self, program: &Path, modules: &[PathBuf]) -> Result<program::Needs, VmmError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(needs) = known.get(program) {
            return Ok(needs.clone());
        }
        let needs = program::needs(program, modules)?;
        known.insert(program.to_owned(), needs.clone());
        Ok(needs)
    }
}

/// Bounds what a VMM does to each disk that it can reach, by what it is told to allow its guest: a broken one obeys nobody.
fn bound_disks(group: &Group, spec: &VmSpec, files: &BTreeSet<PathBuf>) -> Result<(), VmmError> {
    static WARNED: Once = Once::new();
    let rate = DiskRate { bytes: DISK_BYTES_PER_SECOND_MAX, operations: DISK_OPERATIONS_PER_SECOND_MAX };
    let mut disks: BTreeSet<Disk> = spec.volumes.iter().map(|volume| Disk::of_loop(volume.number)).collect();
    for file in files.iter().chain(&spec.root_image) {
        let under = Disk::under(file).map_err(|source| VmmError::File {
            path: file.clone(),
            action: "looked for on its disk",
            source,
        })?;
        disks.extend(under);
    }
    for disk in disks {
        if !group.bound_disk(disk, rate)? {
            WARNED.call_once(|| {
                tracing::warn!("this kernel throttles no disks (CONFIG_BLK_DEV_THROTTLING): a VMM that was taken over can keep them busy");
            });
        }
    }
    Ok(())
}

fn make_folder(path: &Path) -> Result<(), VmmError> {
    match std::fs::create_dir(path) {
        Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(VmmError::File { path: path.to_owned(), action: "created", source })
        }
        _ => Ok(()),
    }
}
