use std::collections::BTreeSet;

use holdfast_model::resource::InstanceReason;
use proptest::prelude::*;

use super::*;
use crate::phase::Event;
use crate::sample::instance;

/// A host as far as the reconciler can tell: which machines run, which TAPs exist, and what is under way.
#[derive(Default)]
struct Host {
    machines: BTreeSet<InstanceId>,
    taps: BTreeSet<InstanceId>,
    under_way: BTreeMap<InstanceId, Action>,
    starts: BTreeMap<InstanceId, u32>,
}

/// What goes wrong, and when; drawn by the test.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    ActionFails,
    MachineEnds,
    AgentRestarts,
    HostRestarts,
}

impl Host {
    /// Carries out one action, or fails at it half-way.
    fn carry_out(&mut self, action: &Action, fails: bool) -> Event {
        let id = action.id();
        let failed = |cause| Event::Ended { cause, detail: "made to fail".to_owned() };
        match action {
            Action::Prepare { .. } => {
                self.taps.insert(id);
                if fails { failed(Cause::Network) } else { Event::Prepared }
            }
            Action::Start { .. } if fails => failed(Cause::VmmStart),
            Action::Start { .. } => {
                assert!(self.taps.contains(&id), "{id} is started without a TAP");
                assert!(self.machines.insert(id), "{id} is started while it runs");
                *self.starts.entry(id).or_default() += 1;
                Event::Started
            }
            Action::BackOff { .. } | Action::Terminate { .. } if fails => {
                Event::ActionFailed { detail: "made to fail".to_owned() }
            }
            Action::BackOff { .. } => {
                self.machines.remove(&id);
                Event::Killed
            }
            Action::Terminate { .. } => {
                self.machines.remove(&id);
                self.taps.remove(&id);
                Event::Removed
            }
            other => panic!("{other:?} takes no time"),
        }
    }
}

struct World {
    host: Host,
    desired: BTreeMap<InstanceId, Arc<NodeInstance>>,
    observed: BTreeMap<InstanceId, Observed>,
    now_ms: u64,
}

impl World {
    /// Plans, checks what must hold of every plan, and begins what was planned.
    fn pass(&mut self) {
        let actions = plan(&self.desired, &self.observed, self.now_ms);
        let mut seen = BTreeSet::new();
        for action in &actions {
            let id = action.id();
            assert!(seen.insert(id), "two actions for {id}");
            let runs = self
                .observed
                .get(&id)
                .is_some_and(|o| matches!(o.phase, Phase::Booting | Phase::Running | Phase::Ready));
            let wanted = self.desired.get(&id).is_some_and(|spec| spec.desired == Desired::Run);
            assert!(!(runs && wanted), "I7: {action:?} for an instance that runs and is wanted");
        }
        for action in &actions {
            let id = action.id();
            if matches!(action, Action::Forget { .. }) {
                self.observed.remove(&id);
                continue;
            }
            let entry = self.observed.entry(id).or_default();
            entry.begin(action, self.now_ms);
            if entry.doing.is_some() {
                self.host.under_way.insert(id, action.clone());
            }
        }
        let again = plan(&self.desired, &self.observed, self.now_ms);
        for action in &actions {
            let repeated = again.iter().find(|other| *other == action);
            assert_eq!(repeated, None, "planned again although it is under way or done");
        }
    }

    fn happen(&mut self, id: InstanceId, event: Event) {
        if let Some(entry) = self.observed.get_mut(&id) {
            entry.step(event, self.now_ms);
        }
    }

    /// One thing happens on the host to the instance with this id.
    fn tick(&mut self, id: InstanceId, fault: Fault) {
        match fault {
            Fault::AgentRestarts | Fault::HostRestarts => {
                self.host.under_way.clear();
                let rebooted = matches!(fault, Fault::HostRestarts);
                if rebooted {
                    self.host.machines.clear();
                    self.host.taps.clear();
                }
                for (id, entry) in &mut self.observed {
                    let alive = self.host.machines.contains(id);
                    entry.recover(alive, rebooted, self.now_ms);
                    if alive && !entry.may_run() {
                        self.host.machines.remove(id);
                    }
                }
                return;
            }
            Fault::MachineEnds => {
                if self.host.machines.remove(&id) {
                    self.happen(id, Event::Ended { cause: Cause::Crashed, detail: String::new() });
                }
                return;
            }
            Fault::None | Fault::ActionFails => {}
        }
        if let Some(action) = self.host.under_way.remove(&id) {
            let event = self.host.carry_out(&action, matches!(fault, Fault::ActionFails));
            self.happen(id, event);
        } else if self.host.machines.contains(&id) {
            self.happen(id, Event::WorkloadRunning);
            self.happen(id, Event::Healthy);
        }
    }

    /// Lets everything run without faults until nothing changes any more.
    fn settle(&mut self) {
        for _ in 0..200 {
            let before = self.observed.clone();
            self.pass();
            for id in self.observed.keys().copied().collect::<Vec<_>>() {
                self.tick(id, Fault::None);
            }
            if before == self.observed {
                match next_wake_ms(&self.desired, &self.observed) {
                    Some(wake_ms) => self.now_ms = self.now_ms.max(wake_ms),
                    None => return,
                }
            }
        }
        panic!("does not settle: {:?}", self.observed);
    }
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        8 => Just(Fault::None),
        2 => Just(Fault::ActionFails),
        2 => Just(Fault::MachineEnds),
        1 => Just(Fault::AgentRestarts),
        1 => Just(Fault::HostRestarts),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Want(u128),
    DrainIt(u128),
    Drop(u128),
    Tick(u128, Fault),
    Sleep(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..5u128).prop_map(Step::Want),
        1 => (0..5u128).prop_map(Step::DrainIt),
        1 => (0..5u128).prop_map(Step::Drop),
        8 => ((0..5u128), fault()).prop_map(|(id, fault)| Step::Tick(id, fault)),
        1 => (0..20_000u64).prop_map(Step::Sleep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn i07_converges_and_never_touches_what_runs(steps in prop::collection::vec(step(), 0..80)) {
        let mut world = World {
            host: Host::default(),
            desired: BTreeMap::new(),
            observed: BTreeMap::new(),
            now_ms: 1_000_000,
        };
        for step in steps {
            match step {
                Step::Want(n) => {
                    let spec = instance(n);
                    world.desired.insert(spec.id, Arc::new(spec));
                }
                Step::DrainIt(n) => {
                    if let Some(spec) = world.desired.get_mut(&InstanceId::from_bits(n)) {
                        Arc::make_mut(spec).desired = Desired::Drain { grace_ms: 7_000 };
                    }
                }
                Step::Drop(n) => {
                    world.desired.remove(&InstanceId::from_bits(n));
                }
                Step::Tick(n, fault) => world.tick(InstanceId::from_bits(n), fault),
                Step::Sleep(ms) => world.now_ms += ms,
            }
            world.pass();
        }
        world.settle();
        for (id, spec) in &world.desired {
            let phase = world.observed[id].phase;
            match spec.desired {
                Desired::Run => prop_assert!(
                    matches!(phase, Phase::Ready | Phase::Failed { .. } | Phase::Stopped),
                    "{phase:?}"
                ),
                Desired::Drain { .. } => {
                    prop_assert!(matches!(phase, Phase::Failed { .. } | Phase::Stopped), "{phase:?}");
                }
            }
            prop_assert_eq!(world.host.machines.contains(id), phase == Phase::Ready);
            prop_assert_eq!(world.host.taps.contains(id), phase == Phase::Ready);
        }
        // What nobody wants is gone, whole.
        prop_assert!(world.observed.keys().all(|id| world.desired.contains_key(id)));
        prop_assert!(world.host.machines.iter().all(|id| world.desired.contains_key(id)));
        prop_assert!(world.host.taps.iter().all(|id| world.desired.contains_key(id)));
    }

    #[test]
    fn pauses_double_and_stay_bounded(bits in any::<u128>(), first_ms in 0..10_000u64, failures in 1..100u32) {
        let id = InstanceId::from_bits(bits);
        let pause_ms = backoff_ms(id, first_ms, failures);
        let least_ms = first_ms.saturating_mul(1 << (failures - 1).min(20)).min(BACKOFF_MS_MAX);
        prop_assert!(pause_ms >= least_ms && pause_ms <= least_ms + least_ms / 8);
    }
}

/// An instance that is ready, and the world around it.
fn ready_world(mut change: impl FnMut(&mut NodeInstance)) -> (World, InstanceId) {
    let mut spec = instance(1);
    change(&mut spec);
    let id = spec.id;
    let mut world = World {
        host: Host::default(),
        desired: BTreeMap::from([(id, Arc::new(spec))]),
        observed: BTreeMap::new(),
        now_ms: 1_000_000,
    };
    world.settle();
    assert_eq!(world.observed[&id].phase, Phase::Ready);
    (world, id)
}

fn ended(cause: Cause) -> Event {
    Event::Ended { cause, detail: "as the test says".to_owned() }
}

#[test]
fn i07_an_agents_restart_starts_nothing_again() {
    let (mut world, id) = ready_world(|_| {});
    for _ in 0..3 {
        world.tick(id, Fault::AgentRestarts);
        world.settle();
    }
    assert_eq!(world.host.starts[&id], 1);
    assert_eq!(world.observed[&id].restarts, 0);
}

#[test]
fn i07_a_changed_specification_restarts_nothing() {
    let (mut world, id) = ready_world(|_| {});
    let spec = Arc::make_mut(world.desired.get_mut(&id).unwrap());
    spec.vars.insert("NEW".to_owned(), "value".to_owned());
    spec.resources.memory_mib += 1;
    assert_eq!(plan(&world.desired, &world.observed, u64::MAX), []);
}

#[test]
fn i05_a_hosts_restart_brings_everything_back_and_blames_nobody() {
    let (mut world, id) = ready_world(|spec| spec.restart.max_retries = 0);
    world.tick(id, Fault::HostRestarts);
    world.settle();
    assert_eq!(world.observed[&id].phase, Phase::Ready);
    assert_eq!(world.host.starts[&id], 2);
}

#[test]
fn an_instance_that_ends_again_and_again_fails_in_the_end() {
    let (mut world, id) = ready_world(|spec| spec.restart.max_retries = 3);
    // It was ready before its first end: that one opens a new row.
    for row in 1..=4 {
        world.host.machines.remove(&id);
        world.happen(id, ended(Cause::Crashed));
        assert_eq!(world.observed[&id].failures, row);
        world.pass();
        world.tick(id, Fault::None);
        let Phase::Backoff { until_ms } = world.observed[&id].phase else { break };
        assert!(until_ms - world.now_ms >= 2_000 << (row - 1));
        world.now_ms = until_ms;
        for _ in 0..3 {
            world.pass();
            if world.observed[&id].doing.is_some() {
                world.tick(id, Fault::None);
            }
        }
        assert_eq!(world.observed[&id].phase, Phase::Booting);
        assert_eq!(world.observed[&id].restarts, row);
    }
    world.settle();
    let failed = Phase::Failed { reason: InstanceReason::CrashLoopBackoff };
    assert_eq!(world.observed[&id].phase, failed);
    assert!(world.host.taps.is_empty());
}

#[test]
fn a_ready_period_ends_a_row_of_failures() {
    let (mut world, id) = ready_world(|spec| spec.restart.max_retries = 1);
    for restarts in 1..=5 {
        world.host.machines.remove(&id);
        world.happen(id, ended(Cause::Crashed));
        world.settle();
        assert_eq!(world.observed[&id].phase, Phase::Ready);
        assert_eq!(world.observed[&id].restarts, restarts);
    }
}

#[test]
fn policies_decide_about_workloads_that_ended() {
    let cases = [
        (RestartPolicy::Always, Cause::Finished, Phase::Ready),
        (RestartPolicy::Always, Cause::Crashed, Phase::Ready),
        (RestartPolicy::OnFailure, Cause::Finished, Phase::Stopped),
        (RestartPolicy::OnFailure, Cause::Unhealthy, Phase::Ready),
        (RestartPolicy::Never, Cause::Finished, Phase::Stopped),
        (RestartPolicy::Never, Cause::Unhealthy, Phase::Failed { reason: InstanceReason::HealthcheckFailed }),
    ];
    for (policy, cause, expected) in cases {
        let (mut world, id) = ready_world(|spec| spec.restart.policy = policy);
        if cause != Cause::Unhealthy {
            world.host.machines.remove(&id);
        }
        world.happen(id, ended(cause));
        world.settle();
        assert_eq!(world.observed[&id].phase, expected, "{policy:?} {cause:?}");
    }
}

#[test]
fn what_serves_is_drained_and_what_does_not_is_stopped_at_once() {
    let (mut world, id) = ready_world(|_| {});
    let spec = world.desired.remove(&id).unwrap();
    let drain = Action::Drain { id, grace_ms: DRAIN_GRACE_MS };
    assert_eq!(plan(&world.desired, &world.observed, world.now_ms), [drain]);
    world.pass();
    assert!(world.host.machines.contains(&id));
    assert_eq!(next_wake_ms(&world.desired, &world.observed), Some(world.now_ms + DRAIN_GRACE_MS));
    // It comes back before the grace is over.
    world.desired.insert(id, spec);
    world.settle();
    assert_eq!(world.observed[&id].phase, Phase::Ready);
    assert_eq!(world.host.starts[&id], 1);

    world.observed.get_mut(&id).unwrap().phase = Phase::Running;
    world.desired.clear();
    let stop = Action::Terminate { id, then: Outcome::Stopped };
    assert_eq!(plan(&world.desired, &world.observed, world.now_ms), [stop]);
    world.settle();
    assert!(world.observed.is_empty() && world.host.machines.is_empty() && world.host.taps.is_empty());
}

#[test]
fn i05_a_clock_that_goes_back_delays_nothing_for_long() {
    let (mut world, id) = ready_world(|_| {});
    world.host.machines.remove(&id);
    world.happen(id, ended(Cause::Crashed));
    world.pass();
    world.tick(id, Fault::None);
    assert!(matches!(world.observed[&id].phase, Phase::Backoff { .. }));
    // A quarter of an hour: longer than any pause.
    world.now_ms -= 900_000;
    assert_eq!(plan(&world.desired, &world.observed, world.now_ms), [Action::Prepare { id }]);
}
