//! Carries out what [`crate::reconcile`] decides: roots, TAPs, folders and VMMs are made and removed here.
//!
//! Every method may be called again after it, or the whole agent, was stopped at any point: what is there already
//! is taken as it is, and what is not there any more need not be removed. What an instance has on this host can be
//! found from its id alone (the name of its TAP, of its folder), so nothing can be forgotten. [`Executor::scan`]
//! finds it after a restart, [`Executor::sweep`] removes what no instance of this agent has.
//!
//! It never kills, removes or renames anything that does not carry this agent's mark: its data folder or its TAP
//! prefix.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use holdfast_client::Published;
use holdfast_model::InstanceId;
use holdfast_model::agent::{Disk, NodeInstance};
use holdfast_model::limits::TERM_GRACE_MS;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::admission::DISK_RESERVE_MIB;
use crate::boot::guest_config;
use crate::exec::Execs;
use crate::host::{self, VmmHost};
use crate::image::{
    Digest, ImageCache, ImageError, ImageRef, Login, ReferenceError, RegistryError, RootImage,
};
use crate::logs::chain;
use crate::machine::Machine;
use crate::network::{Network, NetworkError};
use crate::phase::{Cause, Event};
use crate::pulls::Pulls;
use crate::secrets::NodeSecretsStore;
use crate::step::{AfterStep, Step, unheard};
use crate::vmm::channel::GuestConfig;
use crate::vmm::jail::{JailConfig, Jails};
use crate::vmm::probe::PROBE_FOLDER;
use crate::vmm::{Adoption, Nic, VCPUS_MAX, Vm, VmSpec, VmmError};
use crate::volumes::{Attached, Owner, Volumes};

/// Guests that boot at the same time, at most, for each processor: after a host's restart all of them want to.
const BOOTS_PER_PROCESSOR_MAX: usize = 2;

/// TAPs that are being made, and instances that are being removed, at the same time, at most.
const CHANGES_MAX: usize = 16;

/// Images that are being fetched at the same time, at most. One that is here waits for nobody.
const PULLS_MAX: usize = 4;

/// What images that nothing needs make room for on the disk, in MiB. More than [`DISK_RESERVE_MIB`], so that no instance is
/// refused for want of a disk that is full of them.
pub const DISK_KEEP_MIB: u64 = 4 * DISK_RESERVE_MIB;

/// Why something of an instance could not be found or removed.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// A folder could not be listed, made or removed.
    #[error("'{}' could not be {action}; check its permissions and the disk.", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The TAP.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// A machine that runs, with what its start knew of it.
#[derive(Debug)]
pub struct Running {
    /// The machine.
    pub vm: Vm,
    /// What its guest is told, and its root; `None` for one that was found.
    pub guest: Option<(GuestConfig, RootImage)>,
    /// Its turn to boot, given back when the guest is up.
    pub booting: Option<OwnedSemaphorePermit>,
}

impl Running {
    /// A machine that was found.
    pub fn adopted(vm: Vm) -> Self {
        Self { vm, guest: None, booting: None }
    }
}

/// Acts on the host.
pub struct Executor {
    /// Holds one folder per machine, named by the instance.
    folder: PathBuf,
    network: Network,
    images: ImageCache,
    volumes: Volumes,
    secrets: Arc<NodeSecretsStore>,
    host: VmmHost,
    execs: Arc<Execs>,
    wanted: Wanted,
    waiting: Pulls,
    boots: Arc<Semaphore>,
    changes: Semaphore,
    pulls: Semaphore,
    after_step: AfterStep,
}

impl Executor {
    /// Acts below this data folder, with these means.
    pub fn new(
        data_dir: &Path,
        network: Network,
        images: ImageCache,
        volumes: Volumes,
        secrets: Arc<NodeSecretsStore>,
        host: VmmHost,
        after_step: AfterStep,
    ) -> Result<Self, ExecutorError> {
        let folder = machines_folder(data_dir);
        fs::create_dir_all(&folder).map_err(|source| ExecutorError::Folder {
            path: folder.clone(),
            action: "created",
            source,
        })?;
        let wanted = Wanted { desired: Arc::default(), machines: folder.clone() };
        let asked = wanted.clone();
        let images = images.with_in_use(Arc::new(move || asked.roots_in_use()));
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            folder,
            network,
            images,
            volumes,
            secrets,
            host,
            execs: Arc::default(),
            wanted,
            waiting: Pulls::default(),
            boots: Arc::new(Semaphore::new(processors * BOOTS_PER_PROCESSOR_MAX)),
            changes: Semaphore::new(CHANGES_MAX),
            pulls: Semaphore::new(PULLS_MAX),
            after_step,
        })
    }

    /// Which VMM is used.
    pub fn host(&self) -> &VmmHost {
        &self.host
    }

    /// The guests that can be asked to run programs.
    pub fn execs(&self) -> &Arc<Execs> {
        &self.execs
    }

    /// The images.
    pub fn images(&self) -> &ImageCache {
        &self.images
    }

    /// The volumes' disks.
    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// Which instances wait for their images.
    pub(crate) fn waiting(&self) -> &Pulls {
        &self.waiting
    }

    /// Looks here for the images that are desired when a pull finds the disk full. The first one counts.
    pub fn follow(&self, desired: watch::Receiver<Published<NodeInstance>>) {
        self.wanted.desired.set(desired).ok();
    }

    /// The name of an instance's TAP.
    pub fn tap_name(&self, id: InstanceId) -> String {
        self.network.tap_name(id)
    }

    /// The disk that holds images, logs and machines' folders.
    pub fn disk(&self) -> Option<Disk> {
        host::disk(&self.folder)
    }

    /// Tells that a change of the node's state is durable.
    pub fn stored(&self) {
        (self.after_step)(Step::Stored);
    }

    /// What instances need in secret.
    pub fn secrets(&self) -> &Arc<NodeSecretsStore> {
        &self.secrets
    }

    /// Secrets, image and TAP.
    pub async fn prepare(&self, spec: &NodeInstance) -> Event {
        let prepared = async {
            self.secrets.ensure(spec.id).await.map_err(|error| (Cause::Secrets, chain(&error)))?;
            self.root(spec).await?;
            (self.after_step)(Step::RootReady);
            let _one_of_few = self.changes.acquire().await;
            let made = self.network.ensure(spec.id, spec.address, &self.after_step).await;
            made.map_err(|error| (Cause::Network, chain(&error)))
        };
        match prepared.await {
            Ok(_) => Event::Prepared,
            Err((cause, detail)) => Event::Ended { cause, detail },
        }
    }

    /// Starts the VMM of an instance that was prepared. On failure no process is left.
    pub async fn start(&self, spec: &NodeInstance) -> Result<Running, Event> {
        self.try_start(spec).await.map_err(|(cause, detail)| Event::Ended { cause, detail })
    }

    async fn try_start(&self, spec: &NodeInstance) -> Result<Running, (Cause, String)> {
        let root = self.root(spec).await?;
        let config = guest_config(spec, &root, 0).map_err(|error| (Cause::VmmStart, chain(&error)))?;
        let failed = |error: VmmError| (Cause::VmmStart, chain(&error));
        let vmm = self.host.vmm().await.map_err(failed)?;
        let booting = Arc::clone(&self.boots).acquire_owned().await.ok();
        let tap = self.network.tap_name(spec.id);
        // Held until the machine holds the devices itself.
        let attached = self.attach(spec, &config).await?;
        let vm_spec = VmSpec {
            instance_id: spec.id.to_string(),
            folder: self.machine_folder(spec.id),
            kernel: self.host.kernel().to_owned(),
            initrd: self.host.initrd().to_owned(),
            root_image: Some(root.path.clone()),
            memory_mib: u32::try_from(spec.resources.memory_mib).unwrap_or(u32::MAX),
            vcpus: vcpus(spec.resources.cpu_milli),
            cpu_milli: spec.resources.cpu_milli,
            nic: Some(Nic::for_address(tap, spec.address)),
            volumes: attached.iter().map(Attached::device).collect(),
        };
        let vm = vmm.start(&vm_spec).await.map_err(failed)?;
        (self.after_step)(Step::VmmAnswers);
        Ok(Running { vm, guest: Some((config, root)), booting })
    }

    async fn attach(
        &self,
        spec: &NodeInstance,
        config: &GuestConfig,
    ) -> Result<Vec<Attached>, (Cause, String)> {
        let mut attached = Vec::with_capacity(spec.volumes.len());
        for volume in &spec.volumes {
            let disk = self.volumes.attach(volume, owner(config)).await;
            attached.push(disk.map_err(|error| (Cause::VolumeAttach, chain(&error)))?);
        }
        if !attached.is_empty() {
            (self.after_step)(Step::VolumesAttached);
        }
        Ok(attached)
    }

    /// What is needed to watch an instance that runs already; `None` where its image is not here.
    pub fn watched(&self, spec: &NodeInstance) -> Option<(GuestConfig, RootImage)> {
        let (_, digest) = reference(spec).ok()?;
        let root = self.images.get(digest).ok()??;
        let config = guest_config(spec, &root, 0).ok()?;
        Some((config, root))
    }

    /// A hold on the machine of an instance, if it runs.
    pub fn adopt(&self, id: InstanceId) -> Result<Option<Vm>, ExecutorError> {
        Ok(match Vm::adopt(&self.machine_folder(id))? {
            Adoption::Running(vm) => Some(vm),
            Adoption::Gone => None,
        })
    }

    /// Kills what is left of an instance's machine and takes its TAP down. Folder and TAP stay for the next start.
    pub async fn back_off(&self, id: InstanceId) -> Result<(), ExecutorError> {
        self.kill(id).await?;
        self.network.silence(id).await?;
        (self.after_step)(Step::TapDown);
        Ok(())
    }

    async fn kill(&self, id: InstanceId) -> Result<(), ExecutorError> {
        if let Some(vm) = self.adopt(id)? {
            vm.kill().await?;
            (self.after_step)(Step::Killed);
        }
        Ok(())
    }

    /// Stops an instance's workload and removes everything that it has on this host.
    pub async fn terminate(
        &self,
        id: InstanceId,
        machine: Option<Arc<Machine>>,
    ) -> Result<(), ExecutorError> {
        let _one_of_few = self.changes.acquire().await;
        if let Some(machine) = &machine {
            machine.stop(Duration::from_millis(TERM_GRACE_MS)).await;
            (self.after_step)(Step::WorkloadStopped);
        }
        self.kill(id).await?;
        self.network.remove(&self.network.tap_name(id)).await?;
        (self.after_step)(Step::TapRemoved);
        self.host.jails().release(&id.to_string())?;
        (self.after_step)(Step::GroupRemoved);
        remove_folder(&self.machine_folder(id), &self.after_step)?;
        self.secrets.forget(id);
        Ok(())
    }

    /// Takes the network of every instance down and touches nothing else: memory, disks and logs stay as they are.
    pub async fn isolate(&self) -> Result<(), ExecutorError> {
        self.network.silence_all().await?;
        (self.after_step)(Step::Isolated);
        Ok(())
    }

    /// Looks for machines that run. Starts, stops and changes nothing.
    pub fn scan(&self) -> Result<BTreeMap<InstanceId, Running>, ExecutorError> {
        let mut found = BTreeMap::new();
        for id in self.folders()? {
            match self.adopt(id) {
                Ok(Some(vm)) => {
                    found.insert(id, Running::adopted(vm));
                }
                Ok(None) => {}
                // One instance's trouble is no other one's. It is not started beside a machine that may run: the
                // start would find the same.
                Err(error) => {
                    tracing::error!(instance = %id, error = %chain(&error), "its machine cannot be looked at");
                }
            }
        }
        Ok(found)
    }

    /// Removes whatever belongs to this agent and to none of these instances.
    pub async fn sweep(&self, keep: &BTreeSet<InstanceId>) -> Result<(), ExecutorError> {
        self.secrets.sweep(keep);
        for id in self.folders()?.difference(keep) {
            tracing::warn!(instance = %id, "removing what an instance left that this node does not know");
            self.kill(*id).await?;
            remove_folder(&self.machine_folder(*id), &self.after_step)?;
        }
        for name in self.host.jails().leftovers() {
            if name.parse::<InstanceId>().is_ok_and(|id| !keep.contains(&id)) {
                tracing::warn!(
                    instance = name,
                    "removing the cgroup of an instance that this node does not know"
                );
                self.host.jails().release(&name)?;
                (self.after_step)(Step::GroupRemoved);
            }
        }
        let kept: BTreeSet<String> = keep.iter().map(|id| self.network.tap_name(*id)).collect();
        for tap in self.network.list().await? {
            if !kept.contains(&tap) {
                tracing::warn!(tap, "removing a TAP that no instance of this node has");
                self.network.remove(&tap).await?;
                (self.after_step)(Step::TapRemoved);
            }
        }
        Ok(())
    }

    /// Removes images that nothing here needs, least recently used first, beyond the cache's bound. Blocks on the
    /// disk. The images of these instances stay, and so do those of every machine that is here.
    pub fn collect_images<'a>(&self, wanted: impl Iterator<Item = &'a NodeInstance>) {
        let Some(in_use) = roots_in_use(wanted, &self.folder) else { return };
        let used_bytes = self.images.used_bytes().unwrap_or(0);
        let bytes_max = bytes_max(self.images.bytes_max(), used_bytes, self.disk());
        match self.images.gc(&in_use, bytes_max) {
            Ok(report) => tracing::debug!(?report, "collected images"),
            Err(error) => tracing::warn!(error = %chain(&error), "images could not be collected"),
        }
    }

    async fn root(&self, spec: &NodeInstance) -> Result<RootImage, (Cause, String)> {
        let failed = |error: ImageError| (cause_of(&error), chain(&error));
        let (reference, digest) = reference(spec)?;
        // I5: what is here needs no registry, and no turn in the queue for one.
        if let Some(root) = self.images.get(digest).map_err(failed)? {
            return Ok(root);
        }
        let wait = self.waiting.wait(spec.id, digest);
        let _one_of_few = self.pulls.acquire().await;
        let registry = self.secrets.open_registry(spec.id).map_err(|e| (Cause::Secrets, chain(&e)))?;
        let login = registry.map(|c| Login::new(c.user.reveal(), c.password.reveal()));
        let pulled = self.images.ensure(&reference.with_login(login), &|progress| wait.note(progress)).await;
        if let Err(ImageError::Registry(RegistryError::Denied { .. } | RegistryError::Token { .. })) = &pulled
        {
            // The credential may have been set or changed since this node asked; the next attempt uses it.
            self.secrets.refresh(spec.id).await.ok();
        }
        pulled.map_err(failed)
    }

    fn machine_folder(&self, id: InstanceId) -> PathBuf {
        self.folder.join(id.to_string())
    }

    fn folders(&self) -> Result<BTreeSet<InstanceId>, ExecutorError> {
        let failed = |source| ExecutorError::Folder { path: self.folder.clone(), action: "listed", source };
        let mut ids = BTreeSet::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            ids.extend(name.to_str().and_then(|name| name.parse::<InstanceId>().ok()));
        }
        Ok(ids)
    }
}

/// Whose a new file system is: the workload's user, by number as in its configuration.
fn owner(config: &GuestConfig) -> Owner {
    let (uid, gid) = config.workload.user.split_once(':').unwrap_or_default();
    Owner { uid: uid.parse().unwrap_or_default(), gid: gid.parse().unwrap_or_default() }
}

/// What images may take now: their bound, or less where the disk would have less than [`DISK_KEEP_MIB`] left.
fn bytes_max(bound: u64, used_bytes: u64, disk: Option<Disk>) -> u64 {
    let Some(disk) = disk else { return bound };
    let short_mib = DISK_KEEP_MIB.saturating_sub(disk.free_mib);
    if short_mib == 0 { bound } else { bound.min(used_bytes.saturating_sub(short_mib << 20)) }
}

/// Where it stands which images are in use.
#[derive(Clone)]
struct Wanted {
    desired: Arc<OnceLock<watch::Receiver<Published<NodeInstance>>>>,
    /// The machines' folders.
    machines: PathBuf,
}

impl Wanted {
    /// `None` while it is not known what is desired: unknown is not empty (I5).
    fn roots_in_use(&self) -> Option<HashSet<Digest>> {
        let view = self.desired.get()?.borrow().clone()?;
        roots_in_use(view.items.values().map(Arc::as_ref), &self.machines)
    }
}

/// The images of these instances, and those that machines here were started with, whether or not anybody still wants
/// them. `None` if that cannot be told.
fn roots_in_use<'a>(
    wanted: impl Iterator<Item = &'a NodeInstance>,
    machines: &Path,
) -> Option<HashSet<Digest>> {
    let mut in_use: HashSet<Digest> =
        wanted.filter_map(|spec| reference(spec).ok()).map(|(_, digest)| digest).collect();
    let look = |error: &dyn std::error::Error| {
        tracing::warn!(error = %chain(error), "no images are collected: it is not known which ones machines have");
    };
    for entry in fs::read_dir(machines).inspect_err(|error| look(error)).ok()? {
        let folder = entry.inspect_err(|error| look(error)).ok()?.path();
        let root = Vm::root_in(&folder).inspect_err(|error| look(error)).ok()?;
        in_use.extend(root.as_deref().and_then(RootImage::digest_at));
    }
    Some(in_use)
}

/// The image as the cache wants it, and its digest.
fn reference(spec: &NodeInstance) -> Result<(ImageRef, Digest), (Cause, String)> {
    let text = spec.image.to_string();
    let reference: ImageRef =
        text.parse().map_err(|error: ReferenceError| (Cause::ImagePull, chain(&error)))?;
    let digest = reference.digest().ok_or((Cause::ImagePull, format!("the image {text} has no digest")))?;
    Ok((reference, digest))
}

/// Where the machines of the agent with this data folder are.
pub(crate) fn machines_folder(data_dir: &Path) -> PathBuf {
    data_dir.join("vms")
}

/// Removes a folder and what is in it; one that is not there is no error.
fn remove_folder(path: &Path, after_step: &AfterStep) -> Result<(), ExecutorError> {
    let failed = |source| ExecutorError::Folder { path: path.to_owned(), action: "removed", source };
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let removed = match entry.file_type().map_err(failed)?.is_dir() {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        };
        removed.map_err(failed)?;
        after_step(Step::EntryRemoved);
    }
    fs::remove_dir(path).map_err(failed)?;
    after_step(Step::FolderRemoved);
    Ok(())
}

/// Whole processors for so many thousandths.
fn vcpus(cpu_milli: u64) -> u32 {
    u32::try_from(cpu_milli.div_ceil(1_000)).unwrap_or(VCPUS_MAX).clamp(1, VCPUS_MAX)
}

fn cause_of(error: &ImageError) -> Cause {
    match error {
        // A disk that is full is not the image's fault, wherever it was noticed.
        ImageError::Layer { .. }
        | ImageError::Root(_)
        | ImageError::Thread { .. }
        | ImageError::Disk { .. } => Cause::RootBuild,
        _ => Cause::ImagePull,
    }
}

/// Ends every machine of the agent with this data folder, and removes their folders and its TAPs. Answers with how
/// many ran.
pub(crate) async fn remove_all(data_dir: &Path) -> Result<usize, ExecutorError> {
    let folder = machines_folder(data_dir);
    let list = |source| ExecutorError::Folder { path: folder.clone(), action: "listed", source };
    // A probe's machine, if the agent died under it.
    let mut machines = vec![data_dir.join(PROBE_FOLDER)];
    match fs::read_dir(&folder) {
        Ok(entries) => {
            for entry in entries {
                machines.push(entry.map_err(list)?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(list(source)),
    }
    let mut ended = 0;
    for machine in machines {
        if let Adoption::Running(vm) = Vm::adopt(&machine)? {
            vm.kill().await?;
            ended += 1;
        }
    }
    let jails = Jails::new(data_dir, JailConfig::default(), unheard());
    for name in jails.leftovers() {
        jails.release(&name)?;
    }
    let network = Network::open(data_dir)?;
    for tap in network.list().await? {
        network.remove(&tap).await?;
    }
    network.unguard().await?;
    remove_folder(&data_dir.join(PROBE_FOLDER), &unheard())?;
    remove_folder(&folder, &unheard())?;
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::instance;

    #[test]
    fn images_give_way_before_a_full_disk_refuses_instances() {
        let (gib, disk) = (1_u64 << 30, |free_mib| Some(Disk { total_mib: 100_000, free_mib }));
        assert_eq!(bytes_max(20 * gib, 15 * gib, disk(DISK_KEEP_MIB)), 20 * gib, "there is room");
        assert_eq!(bytes_max(20 * gib, 15 * gib, None), 20 * gib);
        assert_eq!(bytes_max(20 * gib, 15 * gib, disk(DISK_KEEP_MIB - 1_024)), 14 * gib);
        assert_eq!(
            bytes_max(10 * gib, 15 * gib, disk(DISK_KEEP_MIB - 1_024)),
            10 * gib,
            "the bound counts too"
        );
        assert_eq!(bytes_max(20 * gib, gib, disk(0)), 0);
    }

    #[test]
    fn i05_an_image_is_in_use_while_it_is_desired_or_a_machine_here_was_started_with_it() {
        let machines = tempfile::tempdir().unwrap();
        let (wanted, running) = (instance(1), Digest::of(b"runs"));
        let machine = machines.path().join("machine");
        fs::create_dir(&machine).unwrap();
        let in_use = || roots_in_use([&wanted].into_iter(), machines.path());
        let desired = reference(&wanted).unwrap().1;
        assert_eq!(in_use(), Some(HashSet::from([desired])), "a folder without a machine has no image");
        let record = serde_json::json!({
            "version": 1, "instance_id": "x", "kind": "qemu_tcg",
            "process": {"pid": 1, "start_ticks": 1, "boot_id": "x"},
            "root": format!("/images/roots/{}/root.erofs", running.hex()),
        });
        fs::write(machine.join("vm.json"), record.to_string()).unwrap();
        assert_eq!(in_use(), Some(HashSet::from([desired, running])));
        // Of a damaged record it cannot be told: then nothing is to go.
        fs::write(machine.join("vm.json"), "{").unwrap();
        assert_eq!(in_use(), None);
        // Nor while it is not known what is desired.
        fs::remove_file(machine.join("vm.json")).unwrap();
        let asked = Wanted { desired: Arc::default(), machines: machines.path().to_owned() };
        assert_eq!(asked.roots_in_use(), None);
        let published = watch::Sender::new(None);
        asked.desired.set(published.subscribe()).unwrap();
        assert_eq!(asked.roots_in_use(), None);
    }
}
