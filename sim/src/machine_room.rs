//! What a simulated node has below its agent: VMMs' processes, TAPs and machines' folders.
//!
//! It lives as long as the host: an agent that dies leaves it as it is, and only a reboot ends what runs. Each VMM gets its
//! life when it starts, by the seed: when it is up, when it serves, and whether it falls sick or ends by itself.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use holdfast_model::InstanceId;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;

/// From a VMM's start until its workload runs, in milliseconds.
const BOOT_MS: Range<u64> = 10..500;
/// From then until it serves, in milliseconds.
const WARM_UP_MS: Range<u64> = 0..200;
/// How long one serves that does not last, in milliseconds.
const SHORT_LIFE_MS: Range<u64> = 1..4_000;

/// Where a VMM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Its guest comes up.
    Booting,
    /// Its workload runs.
    Running,
    /// It serves.
    Serving,
    /// It runs, and its health check fails.
    Sick,
    /// It ended.
    Gone,
}

/// Who ended a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// It ended by itself.
    Itself,
    /// The host was rebooted.
    Reboot,
    /// The agent, while it was at this stage.
    Agent(Stage),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Happening {
    /// An agent set about to start an instance.
    Starting(InstanceId),
    /// A VMM's process began.
    Began(u32, InstanceId),
    /// A VMM's process ended.
    Ended(u32, InstanceId, By),
}

struct Vmm {
    instance: InstanceId,
    stage: watch::Sender<Stage>,
    /// The rest of its life.
    next: VecDeque<(u64, Stage)>,
}

/// See the module.
pub(crate) struct MachineRoom {
    pub(crate) rng: StdRng,
    now_ms: u64,
    boots: u64,
    last_pid: u32,
    vmms: BTreeMap<u32, Vmm>,
    pub(crate) taps: BTreeSet<InstanceId>,
    pub(crate) folders: BTreeSet<InstanceId>,
    happenings: Vec<Happening>,
    /// Whether things may go wrong by themselves.
    pub(crate) troubled: bool,
}

impl MachineRoom {
    pub(crate) fn new(seed: u64) -> Self {
        MachineRoom {
            rng: StdRng::seed_from_u64(seed),
            now_ms: 0,
            boots: 1,
            last_pid: 100,
            vmms: BTreeMap::new(),
            taps: BTreeSet::new(),
            folders: BTreeSet::new(),
            happenings: Vec::new(),
            troubled: true,
        }
    }

    /// It is this late now: what is due in a VMM's life happens.
    pub(crate) fn advance(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        let mut gone = Vec::new();
        for (pid, vmm) in &mut self.vmms {
            while let Some((_, stage)) = vmm.next.pop_front_if(|(due, _)| *due <= now_ms) {
                vmm.stage.send_replace(stage);
                if stage == Stage::Gone {
                    gone.push(*pid);
                }
            }
        }
        for pid in gone {
            self.remove(pid, By::Itself);
        }
    }

    /// From now on nothing goes wrong by itself.
    pub(crate) fn calm_down(&mut self) {
        self.troubled = false;
        for vmm in self.vmms.values_mut() {
            vmm.next.retain(|(_, stage)| *stage < Stage::Sick);
            // One that would have ended before it was up comes up after all.
            if *vmm.stage.borrow() == Stage::Booting && vmm.next.is_empty() {
                vmm.next = VecDeque::from([(self.now_ms, Stage::Running), (self.now_ms, Stage::Serving)]);
            }
        }
    }

    /// Whether something goes wrong now that does so with this probability.
    pub(crate) fn fails(&mut self, probability: f64) -> bool {
        self.troubled && self.rng.random_bool(probability)
    }

    pub(crate) fn boot_id(&self) -> String {
        format!("boot-{}", self.boots)
    }

    /// The host goes down and comes up: nothing runs any more, and folders are what is left.
    pub(crate) fn reboot(&mut self) {
        self.boots += 1;
        let pids: Vec<u32> = self.vmms.keys().copied().collect();
        for pid in pids {
            self.remove(pid, By::Reboot);
        }
        self.taps.clear();
    }

    /// The VMMs that run, in the order of their start.
    pub(crate) fn running(&self) -> impl Iterator<Item = (u32, InstanceId, Stage)> {
        self.vmms.iter().map(|(pid, vmm)| (*pid, vmm.instance, *vmm.stage.borrow()))
    }

    /// The VMM of an instance, if one runs.
    pub(crate) fn find(&self, instance: InstanceId) -> Option<(u32, watch::Receiver<Stage>)> {
        let found = self.vmms.iter().find(|(_, vmm)| vmm.instance == instance);
        found.map(|(pid, vmm)| (*pid, vmm.stage.subscribe()))
    }

    pub(crate) fn is_running(&self, pid: u32) -> bool {
        self.vmms.contains_key(&pid)
    }

    pub(crate) fn set_about_to_start(&mut self, instance: InstanceId) {
        self.happenings.push(Happening::Starting(instance));
    }

    /// Begins a VMM's process.
    pub(crate) fn begin(&mut self, instance: InstanceId) -> (u32, watch::Receiver<Stage>) {
        self.last_pid += 1;
        let up = self.now_ms + self.rng.random_range(BOOT_MS);
        let serves = up + self.rng.random_range(WARM_UP_MS);
        let mut next = VecDeque::from([(up, Stage::Running), (serves, Stage::Serving)]);
        let ends = serves + self.rng.random_range(SHORT_LIFE_MS);
        match self.rng.random_range(0..100) {
            _ if !self.troubled => {}
            0..3 => next = VecDeque::from([(up, Stage::Gone)]),
            3..10 => next.push_back((ends, Stage::Gone)),
            10..15 => next.push_back((ends, Stage::Sick)),
            _ => {}
        }
        let (stage, seen) = watch::channel(Stage::Booting);
        self.vmms.insert(self.last_pid, Vmm { instance, stage, next });
        self.happenings.push(Happening::Began(self.last_pid, instance));
        (self.last_pid, seen)
    }

    /// Ends a VMM for the agent; one that is gone already is no error.
    pub(crate) fn kill(&mut self, pid: u32) {
        if let Some(stage) = self.vmms.get(&pid).map(|vmm| *vmm.stage.borrow()) {
            self.remove(pid, By::Agent(stage));
        }
    }

    fn remove(&mut self, pid: u32, by: By) {
        if let Some(vmm) = self.vmms.remove(&pid) {
            self.happenings.push(Happening::Ended(pid, vmm.instance, by));
            vmm.stage.send_replace(Stage::Gone);
        }
    }

    /// What happened since this was last asked.
    pub(crate) fn take_happenings(&mut self) -> Vec<Happening> {
        std::mem::take(&mut self.happenings)
    }
}
