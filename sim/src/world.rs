//! The cluster and everything around it, one millisecond at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use holdfast_faulty_disk::Faults;
use holdfast_model::{ClusterVersion, MemberId};
use holdfast_raft::{Compaction, Fault, RaftTls};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::api_member::Cluster;
use crate::checks::Watch;
use crate::client::Account;
use crate::client_pool::ClientPool;
use crate::edges::Edges;
use crate::fault_plan::{FaultKind, FaultPlan};
use crate::happened::{self, Happened};
use crate::host::{Crash, Host};
use crate::network::Network;
use crate::nodes::Nodes;
use crate::process::Machine;
use crate::trace::Trace;
use crate::upgrades::{self, Build, Upgrades};
use crate::watchers::Watchers;
use crate::weather::{self, Blocked, Weather};

/// Between two looks at who leads, in milliseconds.
const STATUS_EVERY_MS: u64 = 5;

/// How far a wall clock jumps, either way, in milliseconds: a day.
const CLOCK_JUMP_MS_MAX: i64 = 24 * 3_600_000;

/// The same before cluster version 2, whose outcomes without a key end ten minutes later by wall clocks.
const CLOCK_JUMP_BEFORE_LOG_TIME_MS_MAX: i64 = 4 * 60_000;

/// How often one host's state may rot: a member is healed three times and then given up.
const ROTS_MAX: u32 = 2;

/// Set by the panic hook: a panic anywhere in the product is a failure, also where a task swallows it.
pub(crate) static PANICKED: AtomicBool = AtomicBool::new(false);

/// Something that ends or begins by itself.
#[derive(Clone, Copy, Debug)]
enum Due {
    Start(u64),
    Heal,
    Calm,
    FastDisk(u64),
    GoodDisk(u64),
    Build(u64, Build),
}

/// The world.
pub(crate) struct World {
    pub(crate) now_ms: u64,
    pub(crate) rng: StdRng,
    pub(crate) plan: FaultPlan,
    pub(crate) hosts: Vec<Host>,
    pub(crate) pool: Option<ClientPool>,
    pub(crate) watchers: Option<Watchers>,
    pub(crate) edges: Option<Edges>,
    pub(crate) nodes: Option<Nodes>,
    pub(crate) trace: Trace,
    pub(crate) watch: Watch,
    network: Network,
    tls: Arc<RaftTls>,
    pub(crate) cluster: Cluster,
    due: Vec<(u64, Due)>,
    faults: u64,
    happened: Happened,
}

impl World {
    pub(crate) fn new(
        plan: FaultPlan,
        mut rng: StdRng,
        trace: Trace,
        tls: Arc<RaftTls>,
        cluster: Cluster,
    ) -> Self {
        let hosts = (1..=plan.members).map(|id| Host::new(id, format!("host-{id}").into())).collect();
        World {
            now_ms: 0,
            network: Network::new(rng.random()),
            rng,
            plan,
            hosts,
            pool: None,
            watchers: None,
            edges: None,
            nodes: None,
            trace,
            watch: Watch::default(),
            tls,
            cluster,
            due: Vec::new(),
            faults: 0,
            happened: Happened::default(),
        }
    }

    /// Gives every host the clocks and the build that its seed says. Answers what is done to the builds later.
    pub(crate) fn equip(&mut self, seed: u64) -> Upgrades {
        let upgrades = upgrades::draw(seed, self.hosts.len());
        let speeds = crate::drift::draw(seed, self.hosts.len());
        self.watch.fastest = speeds.iter().copied().max().unwrap_or_default();
        for (host, speed) in self.hosts.iter_mut().zip(speeds) {
            host.machine.speed = speed;
            if !upgrades.is_empty() {
                host.version_max = upgrades::PREVIOUS;
            }
            self.happened.count(happened::DRIFT, u64::from(speed.drifts()));
        }
        self.happened.note(if self.hosts.len() == 3 { happened::THREE } else { happened::FIVE });
        self.versions_changed();
        self.cluster.version = self.watch.supported;
        upgrades
    }

    /// Does to the builds what is to be done, from now on.
    pub(crate) fn begin_upgrades(&mut self, upgrades: Upgrades) {
        let due = |(after_ms, host, build)| (self.now_ms + after_ms, Due::Build(host, build));
        self.due.extend(upgrades.into_iter().map(due));
    }

    fn versions_changed(&mut self) {
        let supported = self.hosts.iter().map(|host| host.version_max).min();
        self.watch.supported = supported.unwrap_or(ClusterVersion::NEWEST);
    }

    /// Ends a host's process, if there is one, and starts it again as another build.
    fn replace_build(&mut self, id: u64, build: Build) {
        let (version, kind) = match build {
            Build::Newest => (ClusterVersion::NEWEST, happened::UPGRADE),
            Build::Previous => (upgrades::PREVIOUS, happened::GOING_BACK),
        };
        self.hosts[id as usize - 1].version_max = version;
        self.versions_changed();
        self.happened.note(kind);
        self.crash(id, Crash::Kill);
    }

    /// How often each kind of thing happened.
    pub(crate) fn happened(&self) -> Happened {
        let mut happened = self.happened.clone();
        self.network.count(&mut happened);
        happened.count(happened::RAISE, self.watch.raises());
        happened
    }

    /// How many faults there were.
    pub(crate) fn faults(&self) -> u64 {
        self.faults
    }

    fn say(&mut self, text: std::fmt::Arguments<'_>) {
        self.trace.line(self.now_ms, text);
    }

    /// From now on the edges live.
    pub(crate) fn begin_edges(&mut self, account: &Account) {
        let (network, cluster) = (self.network.clone(), self.cluster.clone());
        let edges = Edges::new(self.rng.random(), self.now_ms, network, cluster, self.plan.members, account);
        self.edges = Some(edges);
    }

    /// Starts a host's member.
    pub(crate) fn start(&mut self, id: u64) -> Result<(), String> {
        let compaction = Compaction {
            snapshot_entries: self.plan.snapshot_entries,
            kept_entries: self.plan.kept_entries,
            purge_entries: 8,
        };
        self.say(format_args!("host {id} starts"));
        let host = &mut self.hosts[id as usize - 1];
        host.excused = false;
        if host.is_running() {
            return Ok(());
        }
        host.take_clocks(self.now_ms);
        host.start(&self.network, &self.tls, &self.cluster, &compaction)
    }

    /// One millisecond.
    pub(crate) fn step(&mut self) -> Result<(), String> {
        self.now_ms += 1;
        crate::machine::set_time(Duration::from_millis(self.now_ms), 0);
        for arrived in self.network.advance(self.now_ms) {
            let crate::network::Arrived { pipe, from, to, bytes, sum } = arrived;
            self.trace.line(self.now_ms, format_args!("{from}>{to} pipe {pipe} {bytes} bytes {sum:016x}"));
        }
        self.run_due()?;
        let count = self.hosts.len();
        for turn in 0..count {
            let at = (turn + self.now_ms as usize) % count;
            if !self.hosts[at].is_due(self.now_ms) {
                continue;
            }
            let ticked = self.hosts[at].tick(self.now_ms);
            let id = self.hosts[at].id;
            if self.hosts[at].lost_power() {
                self.say(format_args!("host {id} lost power while it wrote"));
                self.happened.note(happened::POWER_LOSS_IN_WRITE);
                self.crash(id, Crash::PowerLoss);
            } else if let Err(reason) = ticked {
                self.stopped(id, &reason)?;
            }
            self.watch.see(self.now_ms, &self.hosts[at], &mut self.trace)?;
        }
        // Whatever is started from here on has clocks that are right, unless it says otherwise. A runtime that began by a
        // clock that is ahead of its own would take every wait for over.
        crate::machine::set_time(Duration::from_millis(self.now_ms), 0);
        if let Some(edges) = &mut self.edges {
            edges.tick(self.now_ms, &self.hosts, &mut self.trace)?;
        }
        if self.now_ms.is_multiple_of(STATUS_EVERY_MS) {
            self.see_status()?;
        }
        if PANICKED.load(Ordering::Relaxed) {
            return Err("I14: a task panicked; see above".to_owned());
        }
        if let Some(pool) = &mut self.pool {
            pool.tick(self.now_ms, &self.hosts, &mut self.trace)?;
        }
        if let Some(watchers) = &mut self.watchers {
            watchers.tick(self.now_ms, &self.hosts, &mut self.trace)?;
        }
        if let Some(nodes) = &mut self.nodes {
            nodes.tick(self.now_ms, &self.hosts, self.watch.newest(), &mut self.trace)?;
        }
        Ok(())
    }

    fn see_status(&mut self) -> Result<(), String> {
        for at in 0..self.hosts.len() {
            match self.watch.see_status(self.now_ms, &self.hosts[at], &mut self.trace) {
                Some(fault @ Fault::Diverged { .. }) => {
                    return Err(format!("I1: host {} says: {fault}", self.hosts[at].id));
                }
                Some(fault @ Fault::Unsupported { .. }) => {
                    return Err(format!("I1: host {} says: {fault}", self.hosts[at].id));
                }
                Some(fault) => self.stopped(self.hosts[at].id, &fault.to_string())?,
                None => {}
            }
        }
        Ok(())
    }

    /// A member stopped or did not start. That is right after its disk failed, or while bits may have rotted in it that
    /// nobody read yet, and wrong otherwise.
    fn stopped(&mut self, id: u64, reason: &str) -> Result<(), String> {
        if !self.hosts[id as usize - 1].may_fail() {
            return Err(format!("host {id} stopped although its disk is well: {reason}"));
        }
        self.say(format_args!("host {id} stopped: {reason}"));
        self.happened.note(happened::STOPPED_BY_DISK);
        let crash = if self.rng.random_bool(0.5) { Crash::Kill } else { Crash::PowerLoss };
        self.crash(id, crash);
        Ok(())
    }

    fn crash(&mut self, id: u64, crash: Crash) {
        let silent = crash == Crash::PowerLoss && self.rng.random_bool(0.5);
        let down_ms = if self.rng.random_bool(0.5) {
            self.rng.random_range(1..150)
        } else {
            self.rng.random_range(150..3000)
        };
        self.say(format_args!("host {id} goes down: {crash:?}"));
        let host = &mut self.hosts[id as usize - 1];
        if host.is_running() {
            host.take_clocks(self.now_ms);
            let lost = host.crash(crash, &self.network, silent, &mut self.rng);
            self.due.push((self.now_ms + down_ms, Due::Start(id)));
            let kind = if crash == Crash::Kill { happened::KILL } else { happened::POWER_LOSS };
            self.happened.note(kind);
            self.happened.count(happened::WRITES_LOST, u64::from(lost));
        }
    }

    fn run_due(&mut self) -> Result<(), String> {
        let (now, later): (Vec<_>, Vec<_>) = self.due.drain(..).partition(|(at, _)| *at <= self.now_ms);
        self.due = later;
        for (_, due) in now {
            self.say(format_args!("{due:?}"));
            match due {
                Due::Start(id) => self.start(id)?,
                Due::Heal => self.network.set_blocked(Blocked::new()),
                Due::Calm => self.network.set_weather(Weather::CALM),
                Due::FastDisk(id) => self.hosts[id as usize - 1].machine.disk_ms = Machine::WELL.disk_ms,
                Due::GoodDisk(id) => self.hosts[id as usize - 1].set_disk_faults(Faults::default()),
                Due::Build(id, build) => self.replace_build(id, build),
            }
        }
        Ok(())
    }

    /// Ends every fault, for good, and starts who is down.
    pub(crate) fn end_faults(&mut self) -> Result<(), String> {
        self.say(format_args!("faults end"));
        if let Some(watchers) = &mut self.watchers {
            watchers.rest();
        }
        if let Some(edges) = &mut self.edges {
            edges.rest(self.now_ms);
        }
        if let Some(nodes) = &mut self.nodes {
            nodes.end_faults();
        }
        let due = std::mem::take(&mut self.due);
        self.network.set_blocked(Blocked::new());
        self.network.set_weather(Weather::CALM);
        for host in &mut self.hosts {
            host.machine.disk_ms = Machine::WELL.disk_ms;
            host.set_disk_faults(Faults::default());
            host.keep_power();
        }
        for (_, due) in due {
            match due {
                Due::Start(id) => self.start(id)?,
                // Who goes back here is upgraded right after.
                Due::Build(id, Build::Newest) => {
                    self.replace_build(id, Build::Newest);
                    self.start(id)?;
                }
                _ => {}
            }
        }
        // A database that met a failed disk takes nothing more until it is opened again, and may not know it yet.
        for id in 1..=self.hosts.len() as u64 {
            let host = &mut self.hosts[id as usize - 1];
            if host.excused && host.is_running() {
                host.take_clocks(self.now_ms);
                host.crash(Crash::Kill, &self.network, false, &mut self.rng);
                self.start(id)?;
            }
        }
        Ok(())
    }

    fn any_host(&mut self) -> u64 {
        self.rng.random_range(1..=self.hosts.len() as u64)
    }

    /// Who leads, as somebody sees it.
    pub(crate) fn leader(&self) -> Option<u64> {
        let leaders = self.hosts.iter().filter_map(|host| host.member()?.status().leader);
        leaders.map(|leader| leader.0).next()
    }

    /// Someone: often the leader, because most goes wrong there.
    fn victim(&mut self) -> u64 {
        match self.leader() {
            Some(leader) if self.rng.random_bool(0.5) => leader,
            _ => self.any_host(),
        }
    }

    /// Makes the next fault.
    pub(crate) fn cause_fault(&mut self) {
        let kind = self.plan.next(&mut self.rng);
        let id = self.victim();
        let for_ms = self.rng.random_range(100..3500);
        self.faults += 1;
        self.say(format_args!("fault {kind:?} at host {id} for {for_ms} ms"));
        let until = self.now_ms + for_ms;
        match kind {
            FaultKind::Partition => {
                let members: Vec<u64> = self.hosts.iter().map(|host| host.id).collect();
                let leader = self.leader();
                let mut blocked = weather::draw_partition(&mut self.rng, &members, leader);
                let agents = self.edges.as_ref().map(Edges::numbers).unwrap_or_default();
                weather::cut_agents(&mut self.rng, &mut blocked, &agents, &members);
                self.say(format_args!("blocked {blocked:?}"));
                self.happened.count(happened::PARTITION, u64::from(!blocked.is_empty()));
                let one_way = blocked.iter().any(|(from, to)| !blocked.contains(&(*to, *from)));
                self.happened.count(happened::ONE_WAY_PARTITION, u64::from(one_way));
                self.network.set_blocked(blocked);
                self.due.retain(|(_, due)| !matches!(due, Due::Heal));
                self.due.push((until, Due::Heal));
            }
            FaultKind::Kill => self.crash(id, Crash::Kill),
            FaultKind::PowerLoss => self.lose_power(id),
            FaultKind::Blackout => {
                self.happened.note(happened::BLACKOUT);
                for id in 1..=self.hosts.len() as u64 {
                    self.crash(id, Crash::PowerLoss);
                }
            }
            FaultKind::Weather => {
                let weather = Weather::draw(&mut self.rng);
                self.say(format_args!("{weather:?}"));
                self.happened.note(happened::WEATHER);
                self.network.set_weather(weather);
                self.due.retain(|(_, due)| !matches!(due, Due::Calm));
                self.due.push((until, Due::Calm));
            }
            FaultKind::SlowDisk => {
                let slow = self.rng.random_range(5..400);
                self.happened.note(happened::SLOW_DISK);
                self.hosts[id as usize - 1].machine.disk_ms = (slow / 4, slow);
                self.due.push((until, Due::FastDisk(id)));
            }
            FaultKind::FullDisk => {
                let full = Faults { write_fails: true, ..Faults::default() };
                self.disk_faults(id, full, until, happened::FULL_DISK);
            }
            FaultKind::FailedSync => {
                let failing = Faults { sync_fails: true, ..Faults::default() };
                self.disk_faults(id, failing, until, happened::FAILED_SYNC);
            }
            FaultKind::ClockJump => {
                let most = match self.watch.version().has_log_time() {
                    true => CLOCK_JUMP_MS_MAX,
                    false => CLOCK_JUMP_BEFORE_LOG_TIME_MS_MAX,
                };
                self.hosts[id as usize - 1].machine.wall_offset_ms = self.rng.random_range(-most..=most);
                self.happened.note(happened::CLOCK_JUMP);
            }
            FaultKind::Transfer => self.transfer(id),
            FaultKind::Snapshot => self.snapshot(id),
            FaultKind::Membership => self.change_membership(id),
            FaultKind::BitRot => self.rot(id),
        }
    }

    fn lose_power(&mut self, id: u64) {
        if self.rng.random_bool(0.3) {
            return self.crash(id, Crash::PowerLoss);
        }
        let (steps, on_log) = (self.rng.random_range(1..80), self.rng.random_bool(0.7));
        self.say(format_args!("host {id} loses power after {steps} steps, on its log: {on_log}"));
        self.hosts[id as usize - 1].lose_power_after(steps, on_log);
    }

    fn disk_faults(&mut self, id: u64, faults: Faults, until: u64, kind: happened::Kind) {
        let host = &mut self.hosts[id as usize - 1];
        if host.is_running() {
            host.set_disk_faults(faults);
            host.excused = true;
            self.due.push((until, Due::GoodDisk(id)));
            self.happened.note(kind);
        }
    }

    /// Rots bits in a state, of less than half of the hosts in a run: what rots is found late, and somebody must be left who
    /// can fill the others.
    fn rot(&mut self, id: u64) {
        let hosts = self.hosts.len();
        let rotten = self.hosts.iter().filter(|host| host.rotted > 0).count();
        let times = self.hosts[id as usize - 1].rotted;
        if times >= ROTS_MAX || (times == 0 && rotten >= hosts.div_ceil(2) - 1) {
            return;
        }
        let bits = self.rng.random_range(1..200);
        self.say(format_args!("{bits} bits rot in the state of host {id}"));
        let host = &mut self.hosts[id as usize - 1];
        host.rotted += 1;
        host.excused = true;
        host.rot(bits, &mut self.rng);
        self.happened.note(happened::BIT_ROT);
    }

    fn transfer(&mut self, to: u64) {
        let at = self.any_host();
        let host = &self.hosts[at as usize - 1];
        if let Some(member) = host.member().cloned() {
            self.happened.note(happened::TRANSFER);
            // It may fail as well as succeed: the others may be out of reach.
            host.spawn(async move { drop(member.transfer_leader(MemberId(to)).await) });
        }
    }

    fn snapshot(&mut self, id: u64) {
        let host = &self.hosts[id as usize - 1];
        if let Some(member) = host.member().cloned() {
            self.happened.note(happened::SNAPSHOT);
            host.spawn(async move { drop(member.snapshot().await) });
        }
    }

    fn change_membership(&mut self, id: u64) {
        let at = self.any_host();
        let host = &self.hosts[at as usize - 1];
        if let Some(member) = host.member().cloned() {
            self.happened.note(happened::MEMBERSHIP);
            host.spawn(async move {
                drop(member.demote(MemberId(id)).await);
                drop(member.promote(MemberId(id)).await);
            });
        }
    }
}
