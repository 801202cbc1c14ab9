//! An agent that dies between any two steps, at every one in turn: after the next agent's pass nothing is left that should
//! not be there, nothing is there twice, and what was healthy was left alone.
//!
//! The agents are processes of their own and end by `kill -9`; TAPs, jails, user ids and QEMUs are real. Needs what
//! `cargo xtask assets` makes and installs, and root. Each test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of single machines")]
mod guest_image;
#[allow(dead_code, reason = "shared with other tests")]
mod namespace;
#[allow(dead_code, reason = "shared with the tests of an outage")]
mod scene;

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_jail::cgroup::Hierarchy;
use holdfast_model::agent::NodeInstance;
use holdfast_model::resource::InstanceState;
use holdfast_model::volume::NodeVolume;
use holdfast_model::{InstanceId, VolumeId};
use holdfast_node::state::State;
use holdfast_node::step::Step;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scene::inventory::Inventory;
use scene::{Agent, InstanceStatusView, Point, Scene, kill, reap, runs, until, view, was_agent};

/// Create and kill cycles of one run, unless [`CYCLES`] says otherwise.
const CYCLES_DEFAULT: u32 = 12;
const CYCLES: &str = "HOLDFAST_CRASH_CYCLES";
/// The seed of a run; drawn and printed where it is not set.
const SEED: &str = "HOLDFAST_CRASH_SEED";
/// Instances that come and go together in a cycle.
const TOGETHER: u16 = 4;

/// A node with one instance that serves all the time, and others that come and go beside it.
struct Stage {
    scene: Scene,
    neighbour: NodeInstance,
    healthy: InstanceStatusView,
    /// What the host holds while only the neighbour runs.
    alone: Inventory,
}

impl Stage {
    fn new(test: &'static str) -> Self {
        let mut scene = Scene::new(test);
        let neighbour = scene.instance(1);
        scene.desire(std::slice::from_ref(&neighbour));
        let mut agent = scene.agent();
        let healthy = agent.wait_for(neighbour.id, InstanceState::Ready);
        until("the probe is over", || scene.data_dir().join("vmm-verdict.json").exists());
        let alone = Inventory::take(&scene.data_dir(), Some(agent.pid()));
        assert_eq!(alone.processes(), 1, "{alone:?}");
        agent.kill();
        Self { scene, neighbour, healthy, alone }
    }

    /// One that comes and goes: small, and started again at once when it ends.
    fn passing(&self, n: u16) -> NodeInstance {
        let mut instance = self.scene.instance(n);
        instance.resources.memory_mib = 64;
        instance.restart.backoff_ms = 1;
        instance.restart.max_retries = 1_000;
        instance.volumes = vec![NodeVolume {
            id: VolumeId::from_bits(u128::from(n)),
            generation: 1,
            size_mib: 16,
            fresh: true,
            path: "/data".to_owned(),
            read_only: false,
        }];
        instance
    }

    fn desire(&mut self, passing: &[NodeInstance]) {
        let all: Vec<_> = std::iter::once(self.neighbour.clone()).chain(passing.iter().cloned()).collect();
        self.scene.desire(&all);
    }

    /// Lets an agent go to `done`, or to its crash; answers whether it crashed.
    fn run(&self, crash: Option<Point>, done: impl FnMut() -> bool) -> bool {
        let mut agent = match crash {
            Some(point) => self.scene.agent_that_crashes(point),
            None => self.scene.agent(),
        };
        let crashed = agent.ended_or(done);
        drop(agent);
        crashed
    }

    /// Lets an agent run until the host holds exactly this.
    fn settle(&self, what: &str, expected: &Inventory, done: impl Fn() -> bool) {
        let agent = self.scene.agent();
        self.await_settled(&agent, what, expected);
        // What an agent tells of is stored, and the next one goes on from there.
        until(&format!("{what}: the agent says that it is done"), done);
        agent.kill();
        reap();
    }

    fn await_settled(&self, agent: &Agent, what: &str, expected: &Inventory) {
        let mut found = None;
        let settled = scene::becomes(|| {
            let now = Inventory::take(&self.scene.data_dir(), Some(agent.pid()));
            let same = now == *expected;
            found = Some(now);
            same
        });
        assert!(settled, "{what}: there is\n{found:#?}\ninstead of\n{expected:#?}");
        // It is known before it is told.
        until("the neighbour is told of", || self.seen(self.neighbour.id).is_some());
        assert_eq!(self.seen(self.neighbour.id), Some(self.healthy), "{what}: the neighbour was left alone");
    }

    fn seen(&self, id: InstanceId) -> Option<InstanceStatusView> {
        view(&self.scene.data_dir(), id)
    }

    fn is_started(&self, id: InstanceId) -> bool {
        self.seen(id).is_some_and(|seen| seen.pid.is_some())
    }

    fn is_forgotten(&self, id: InstanceId) -> bool {
        self.seen(self.neighbour.id).is_some() && self.seen(id).is_none()
    }

    /// Ends the VMM of an instance, as a crash does. No agent may be running.
    fn crash_vmm(&self, instance: &NodeInstance) {
        let healthy = self.healthy.pid.unwrap();
        let pids: Vec<u32> =
            self.scene.vmms().into_iter().filter(|pid| *pid != healthy && runs(*pid)).collect();
        let [pid] = pids[..] else { panic!("{} has {pids:?}", instance.id) };
        kill(pid);
        until("its VMM is gone", || !runs(pid));
    }
}

/// What an agent is to do, and how one tells that it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    /// An instance is new.
    BringUp,
    /// Its VMM has crashed.
    StartAgain,
    /// It is no longer desired.
    TakeDown,
    /// It has left things, and nothing is known of it any more.
    Sweep,
}

impl Task {
    /// Brings the host to where the task begins. No agent runs.
    fn set(self, stage: &mut Stage, passing: &NodeInstance) {
        match self {
            Self::BringUp => stage.desire(std::slice::from_ref(passing)),
            Self::StartAgain => stage.crash_vmm(passing),
            Self::TakeDown => stage.desire(&[]),
            Self::Sweep => {
                stage.crash_vmm(passing);
                let state = State::open(&stage.scene.data_dir().join("node.redb")).unwrap();
                state.store(&[(passing.id, None)]).unwrap();
                drop(state);
                stage.desire(&[]);
            }
        }
    }

    fn is_done(self, stage: &Stage, passing: &NodeInstance) -> bool {
        match self {
            Self::BringUp | Self::StartAgain => stage.is_started(passing.id),
            Self::TakeDown => stage.is_forgotten(passing.id),
            Self::Sweep => {
                let folder = stage.scene.data_dir().join("vms").join(passing.id.to_string());
                stage.is_forgotten(passing.id) && !folder.exists() && stage.scene.taps().len() == 1
            }
        }
    }
}

/// Does a task once without a crash, for its points, and then once for each of them, with an agent that dies there. What
/// the host must hold is what it held after the first time.
fn crash_everywhere(stage: &mut Stage, round: &[Task], passing: &NodeInstance) -> BTreeSet<Step> {
    let mut plain = Vec::new();
    for task in round {
        task.set(stage, passing);
        let agent = stage.scene.agent();
        until(&format!("{task:?} is done"), || task.is_done(stage, passing));
        // What follows at once belongs to it.
        std::thread::sleep(Duration::from_millis(300));
        plain.push((
            *task,
            stage.scene.points(),
            Inventory::take(&stage.scene.data_dir(), Some(agent.pid())),
        ));
        agent.kill();
    }
    assert_eq!(plain.last().unwrap().2, stage.alone, "nothing is left without a crash");
    let most = plain.iter().map(|(_, points, _)| points.len()).max().unwrap();
    let mut crashed_after = BTreeSet::new();
    for at in 0..most {
        for (task, points, after) in &plain {
            task.set(stage, passing);
            let point = points.get(at).copied();
            let crashed = stage.run(point, || task.is_done(stage, passing));
            let what = format!("{task:?}, crash at {point:?}");
            if let Some(point) = point {
                // How many changes of the state one write holds is chance; every other step comes every time.
                assert!(crashed || point.step == Step::Stored, "{what}: it did not come there");
                crashed_after.extend(crashed.then_some(point.step));
            }
            stage.settle(&what, after, || task.is_done(stage, passing));
            if matches!(task, Task::BringUp | Task::StartAgain) {
                let restarts = u32::from(*task == Task::StartAgain);
                assert_eq!(stage.seen(passing.id).unwrap().restarts, restarts, "{what}");
            }
        }
    }
    eprintln!("{round:?}: {most} rounds, crashes after {crashed_after:?}");
    crashed_after
}

#[test]
fn i05_a_crash_between_any_two_steps_leaks_nothing_and_restarts_nothing() {
    const TEST: &str = "i05_a_crash_between_any_two_steps_leaks_nothing_and_restarts_nothing";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut stage = Stage::new(TEST);
    let passing = stage.passing(2);
    let mut crashed_after =
        crash_everywhere(&mut stage, &[Task::BringUp, Task::StartAgain, Task::TakeDown], &passing);
    crashed_after.extend(crash_everywhere(&mut stage, &[Task::BringUp, Task::Sweep], &passing));
    let mut all: BTreeSet<Step> = Step::ALL.iter().copied().collect();
    // That one is for good; see `i11_a_node_that_was_quarantined_…`.
    all.remove(&Step::Isolated);
    // Its image is there; see `i05_a_crash_at_any_step_of_a_pull_…`.
    all.retain(|step| !Step::OF_IMAGES.contains(step));
    if Hierarchy::find().is_err() {
        // This host has no cgroups to be made.
        all.remove(&Step::GroupMade);
    }
    assert_eq!(crashed_after, all, "every step was somewhere the last one of an agent");

    // After all of that an instance still comes up whole.
    stage.desire(std::slice::from_ref(&passing));
    let mut agent = stage.scene.agent();
    agent.wait_for(passing.id, InstanceState::Ready);
    assert!(scene::fetch(passing.address).unwrap().contains("page of 2"));
    agent.stop();
    assert_eq!(stage.scene.wipe(), 2);
}

#[test]
fn i05_an_agent_that_dies_while_it_probes_leaves_nothing() {
    const TEST: &str = "i05_an_agent_that_dies_while_it_probes_leaves_nothing";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    // Where there is KVM and it boots nothing a probe takes long to say so; one that is nothing of the kind fails at once.
    if std::path::Path::new("/dev/kvm").exists() {
        namespace::run("mount", &["--bind", "/dev/null", "/dev/kvm"]);
    }
    let stage = Stage::new(TEST);
    let verdict = stage.scene.data_dir().join("vmm-verdict.json");
    let probed = || {
        std::fs::remove_file(&verdict).unwrap();
        stage.run(None, || verdict.exists());
    };
    probed();
    let points = stage.scene.points();
    assert!(points.iter().any(|point| point.step == Step::Executed), "{points:?}");
    for point in points {
        std::fs::remove_file(&verdict).unwrap();
        assert!(stage.run(Some(point), || verdict.exists()), "it did not come to {point:?}");
        stage.settle(&format!("probe, crash at {point:?}"), &stage.alone, || verdict.exists());
    }
    assert_eq!(stage.scene.wipe(), 1);
}

/// How an agent of a cycle ends.
fn crash_somehow(stage: &Stage, rng: &mut StdRng, done: impl Fn() -> bool) {
    if rng.random_bool(0.5) {
        let step = Step::ALL[rng.random_range(0..Step::ALL.len())];
        stage.run(Some(Point { step, nth: rng.random_range(1..=u32::from(TOGETHER)) }), done);
    } else {
        // In the middle of a step, or of a launcher's work.
        let agent = stage.scene.agent();
        std::thread::sleep(Duration::from_micros(rng.random_range(0..900_000)));
        agent.kill();
    }
}

/// `cargo xtask bench node` runs a thousand.
#[test]
fn i05_instances_that_come_and_go_beside_crashes_leak_nothing() {
    const TEST: &str = "i05_instances_that_come_and_go_beside_crashes_leak_nothing";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let cycles = std::env::var(CYCLES).map_or(CYCLES_DEFAULT, |text| text.parse().unwrap());
    let seed = std::env::var(SEED).map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    println!("{SEED}={seed} {CYCLES}={cycles}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut stage = Stage::new(TEST);
    let mut crashes = 0;
    for round in 0..cycles.div_ceil(u32::from(TOGETHER)) {
        let passing: Vec<_> = (2..2 + TOGETHER).map(|n| stage.passing(n)).collect();
        stage.desire(&passing);
        for _ in 0..rng.random_range(0..=2) {
            crash_somehow(&stage, &mut rng, || passing.iter().all(|one| stage.is_started(one.id)));
            crashes += 1;
        }
        let agent = stage.scene.agent();
        until("all of them are started", || passing.iter().all(|one| stage.is_started(one.id)));
        agent.kill();
        stage.desire(&[]);
        for _ in 0..rng.random_range(0..=2) {
            crash_somehow(&stage, &mut rng, || passing.iter().all(|one| stage.is_forgotten(one.id)));
            crashes += 1;
        }
        let forgotten = || passing.iter().all(|one| stage.is_forgotten(one.id));
        stage.settle(&format!("round {round} of {SEED}={seed}"), &stage.alone, forgotten);
    }
    assert_eq!(stage.scene.vmms(), [stage.healthy.pid.unwrap()]);
    println!("cycles {cycles}, agents that crashed {crashes}, leaks 0, restarts of what was healthy 0");
    assert_eq!(stage.scene.wipe(), 1);
}
