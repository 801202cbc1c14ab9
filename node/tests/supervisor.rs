//! The agent's loop, as far as no guest is needed to see what it does and leaves alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use holdfast_client::{Published, View};
use holdfast_model::agent::{NodeInstance, Stamp};
use holdfast_model::resource::InstanceReason;
use holdfast_model::{ClusterId, Incarnation, InstanceId, Revision};
use holdfast_node::executor::Executor;
use holdfast_node::host::{VmmChoice, VmmHost};
use holdfast_node::image::ImageCache;
use holdfast_node::logs::{Line, Logs, Ring};
use holdfast_node::network::Network;
use holdfast_node::phase::{Observed, Outcome, Phase};
use holdfast_node::secrets::NodeSecretsStore;
use holdfast_node::state::State;
use holdfast_node::step::{Step, unheard};
use holdfast_node::supervisor::{InstanceView, Supervisor};
use holdfast_node::vmm::jail::{JailConfig, Jails};
use tokio::sync::{oneshot, watch};

/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

fn state(folder: &Path) -> State {
    State::open(&folder.join("node.redb")).unwrap()
}

/// Runs the loop until `done` holds for what it knows, then ends it. `after_step` hears of each step on the host.
async fn run(
    folder: &Path,
    state: State,
    desired: Published<NodeInstance>,
    after_step: impl Fn(&State, Step) + Send + Sync + 'static,
    done: impl Fn(&BTreeMap<InstanceId, InstanceView>) -> bool,
) -> Arc<Logs> {
    let jails = Arc::new(Jails::new(folder, JailConfig::default(), unheard()));
    let host = VmmHost::new(folder, folder, VmmChoice::Auto, jails);
    let images = ImageCache::open(&folder.join("images")).unwrap();
    let state = Arc::new(state);
    let seen = Arc::clone(&state);
    let after_step = Arc::new(move |step| after_step(&seen, step));
    let volumes = holdfast_node::volumes::Volumes::open(&folder.join("volumes")).unwrap();
    let secrets = Arc::new(NodeSecretsStore::open(folder, BTreeSet::new).unwrap());
    let network = Network::open(folder).unwrap();
    let executor = Executor::new(folder, network, images, volumes, secrets, host, after_step).unwrap();
    let logs = Arc::new(Logs::open(folder.join("logs")).unwrap());
    let desired = watch::Sender::new(desired);
    let supervisor = Supervisor::new(Arc::new(executor), state, Arc::clone(&logs), desired.subscribe());
    let mut snapshots = supervisor.snapshots();
    let (shutdown, down) = oneshot::channel::<()>();
    let running = tokio::spawn(supervisor.run(async {
        down.await.ok();
    }));
    let reached = snapshots.wait_for(|seen| seen.as_ref().is_some_and(|seen| done(&seen.instances)));
    tokio::time::timeout(PATIENCE, reached).await.unwrap().unwrap();
    shutdown.send(()).unwrap();
    tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
    logs
}

/// A desired set in which there is nothing.
fn nothing() -> Published<NodeInstance> {
    let stamp =
        Stamp { cluster: ClusterId::from_bits(1), incarnation: Incarnation(1), revision: Revision(1) };
    Some(Arc::new(View { stamp, items: Arc::default(), held: None }))
}

fn at(phase: Phase) -> Observed {
    Observed { phase, restarts: 2, ..Observed::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn i05_while_it_is_unknown_what_is_desired_nothing_is_begun_and_nothing_removed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let phases = [
        Phase::Preparing,
        Phase::Backoff { until_ms: 0 },
        Phase::Terminating { then: Outcome::Stopped },
        Phase::Stopped,
        Phase::Failed { reason: InstanceReason::HealthcheckFailed },
    ];
    let known: BTreeMap<_, _> = (1..).map(InstanceId::from_bits).zip(phases.map(at)).collect();
    let records: Vec<_> = known.iter().map(|(id, seen)| (*id, Some(seen.clone()))).collect();
    state(folder).store(&records).unwrap();
    // What an instance left whose record is lost as well.
    let left = folder.join("vms").join(InstanceId::from_bits(99).to_string());
    fs::create_dir_all(&left).unwrap();

    run(folder, state(folder), None, |_, _| {}, |seen| seen.len() == known.len()).await;
    assert_eq!(state(folder).load().unwrap(), known);
    assert!(left.is_dir(), "what may still be wanted was removed");

    // An empty set is another thing: nothing of them is wanted any more.
    run(folder, state(folder), nothing(), |_, _| {}, BTreeMap::is_empty).await;
    assert_eq!(state(folder).load().unwrap(), BTreeMap::new());
    assert!(!left.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn i05_what_is_begun_is_on_disk_first() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let id = InstanceId::from_bits(1);
    state(folder).store(&[(id, Some(at(Phase::Preparing)))]).unwrap();
    let found = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&found);
    // An agent that died in any of these steps must find that it was removing the instance, not preparing it.
    let after_step = move |state: &State, step| {
        let phase = state.load().unwrap().get(&id).map(|seen| seen.phase);
        note.lock().unwrap().push((step, phase));
    };
    run(folder, state(folder), nothing(), after_step, BTreeMap::is_empty).await;
    let removing = Some(Phase::Terminating { then: Outcome::Stopped });
    let found = found.lock().unwrap();
    assert_eq!(found[..3], [Step::Stored, Step::TapRemoved, Step::GroupRemoved].map(|step| (step, removing)));
    assert!(found[3..].iter().all(|(step, _)| *step == Step::Stored), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn i14_the_log_of_an_instance_that_ends_meanwhile_goes_when_its_time_is_over() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let id = InstanceId::from_bits(1);
    state(folder).store(&[(id, Some(at(Phase::Preparing)))]).unwrap();
    let ring = folder.join("logs").join(id.to_string());
    // From long ago.
    Ring::open(ring.clone()).unwrap().append(&[Line::remark(1, "once")]).unwrap();
    let logs = run(folder, state(folder), None, |_, _| {}, |seen| seen.len() == 1).await;
    logs.sweep().unwrap();
    assert!(ring.is_dir(), "it may be here");
    let logs = run(folder, state(folder), nothing(), |_, _| {}, BTreeMap::is_empty).await;
    logs.sweep().unwrap();
    assert!(!ring.exists());
}

/// A process that lives until its input ends, and the record by which an agent takes it for a machine's.
fn machine(folder: &Path, id: InstanceId) -> Child {
    let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let process = format!(r#"{{"pid":{},"start_ticks":{start},"boot_id":"{}"}}"#, child.id(), boot.trim());
    let folder = folder.join("vms").join(id.to_string());
    fs::create_dir_all(&folder).unwrap();
    let record = format!(r#"{{"version":1,"instance_id":"{id}","kind":"qemu_tcg","process":{process}}}"#);
    fs::write(folder.join("vm.json"), record).unwrap();
    child
}

#[tokio::test(flavor = "multi_thread")]
async fn i07_a_machine_that_runs_is_adopted_and_one_that_was_to_be_gone_is_ended() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [serving, lost, ending] = [1, 2, 3].map(InstanceId::from_bits);
    let mut machines = [serving, lost, ending].map(|id| machine(folder, id));
    let pausing = at(Phase::Backoff { until_ms: u64::MAX });
    // Nothing is known any more of the second.
    state(folder).store(&[(serving, Some(at(Phase::Ready))), (ending, Some(pausing))]).unwrap();
    let pids = machines.each_ref().map(Child::id);
    let adopted = |seen: &BTreeMap<InstanceId, InstanceView>| {
        let pid = |id| seen.get(id).and_then(|view| view.machine).map(|(pid, _)| pid);
        [serving, lost, ending].each_ref().map(pid) == [Some(pids[0]), Some(pids[1]), None]
    };
    run(folder, state(folder), None, |_, _| {}, adopted).await;
    for machine in &mut machines[..2] {
        assert!(machine.try_wait().unwrap().is_none(), "a machine that runs was ended");
        machine.kill().unwrap();
        machine.wait().unwrap();
    }
    assert!(!machines[2].wait().unwrap().success());
}
