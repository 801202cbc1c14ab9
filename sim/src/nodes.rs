//! All nodes of a run: their agents, their ways to the control plane, what goes wrong with them, and who deploys to them.

use std::ops::Range;

use holdfast_model::resource::Capacity;
use holdfast_model::{NodeId, Revision};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::deployer::{Deployer, Estate};
use crate::host::Host;
use crate::node_checks::{self, NodeWatch};
use crate::node_host::NodeHost;
use crate::node_link::NodeLink;
use crate::trace::Trace;

/// What each node has.
pub(crate) const CAPACITY: Capacity = Capacity { memory_mib: 4_096, cpu_milli: 8_000 };

/// Between two faults of nodes, in milliseconds.
const FAULT_MS: Range<u64> = 50..1_200;
/// How long a node is cut off, in milliseconds.
const CUT_MS: Range<u64> = 100..6_000;
/// How far a node's wall clock jumps, either way, in milliseconds.
const CLOCK_JUMP_MS_MAX: i64 = 3_600_000;
/// Between two looks at whether everything has settled, in milliseconds.
const LOOK_EVERY_MS: u64 = 20;

/// See the module.
pub(crate) struct Nodes {
    rng: StdRng,
    nodes: Vec<NodeHost>,
    links: Vec<NodeLink>,
    deployer: Deployer,
    watch: NodeWatch,
    /// When the next fault comes; `None` when none does.
    fault_ms: Option<u64>,
    deaths: u64,
}

impl Nodes {
    pub(crate) fn new(
        seed: u64,
        cluster: &str,
        secret: String,
        estate: Estate,
        ids: &[NodeId],
    ) -> Result<Self, String> {
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = ids.iter().enumerate().map(|(at, id)| NodeHost::new(at + 1, *id, rng.random())).collect();
        let links = ids.iter().map(|id| NodeLink::new(cluster, *id, CAPACITY)).collect::<Result<_, _>>()?;
        let deployer = Deployer::new(rng.random(), secret, estate);
        Ok(Nodes { rng, nodes, links, deployer, watch: NodeWatch::default(), fault_ms: Some(0), deaths: 0 })
    }

    /// VMMs that were started, and how often an agent or its host went down.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.watch.begun(), self.deaths)
    }

    /// One millisecond. `newest` is the newest revision that any member has applied.
    pub(crate) fn tick(
        &mut self,
        now_ms: u64,
        hosts: &[Host],
        newest: Revision,
        trace: &mut Trace,
    ) -> Result<(), String> {
        if self.fault_ms.is_some_and(|at| at <= now_ms) {
            self.cause_fault(now_ms, trace);
        }
        self.deployer.tick(now_ms, hosts, trace)?;
        let mut happened = false;
        for (node, link) in self.nodes.iter_mut().zip(&mut self.links) {
            link.tick(now_ms, node, hosts, newest, &mut self.rng)?;
            if node.tick(now_ms, &mut self.rng)? {
                self.deaths += 1;
                link.lose();
                trace.line(now_ms, format_args!("node {} goes down", node.number));
            }
            let happenings = node.room().take_happenings();
            for happening in &happenings {
                trace.line(now_ms, format_args!("node {} {happening:?}", node.number));
            }
            happened |= !happenings.is_empty();
            self.watch.see(now_ms, node, newest, &happenings)?;
        }
        if happened { NodeWatch::see_all(&self.nodes) } else { Ok(()) }
    }

    fn cause_fault(&mut self, now_ms: u64, trace: &mut Trace) {
        self.fault_ms = Some(now_ms + self.rng.random_range(FAULT_MS));
        let at = self.rng.random_range(0..self.nodes.len());
        let (node, link) = (&mut self.nodes[at], &mut self.links[at]);
        let kind = self.rng.random_range(0..12);
        trace.line(now_ms, format_args!("fault {kind} at node {}", node.number));
        match kind {
            0..2 => link.cut(now_ms + self.rng.random_range(CUT_MS)),
            2..4 if node.is_up() => {
                self.deaths += 1;
                link.lose();
                node.kill_agent(now_ms, &mut self.rng);
            }
            4 => node.kill_agent_after(self.rng.random_range(1..25), 0),
            5..7 | 11 => node.kill_agent_after(0, self.rng.random_range(1..6)),
            7 => node.lose_power_after(self.rng.random_range(1..60)),
            8 if self.rng.random_bool(0.3) => {
                self.deaths += 1;
                link.lose();
                node.reboot(now_ms, &mut self.rng);
            }
            9 => {
                let jump = self.rng.random_range(-CLOCK_JUMP_MS_MAX..=CLOCK_JUMP_MS_MAX);
                node.wall_offset_ms = jump;
            }
            10 => {
                self.deaths += 1;
                link.cut(now_ms + self.rng.random_range(CUT_MS));
                node.lose_replica(now_ms, &mut self.rng);
            }
            _ => {}
        }
    }

    /// Ends every fault, for good.
    pub(crate) fn end_faults(&mut self) {
        self.fault_ms = None;
        for (node, link) in self.nodes.iter_mut().zip(&mut self.links) {
            link.cut(0);
            node.calm_down();
            // Mostly what waits for its time is over at once; the other runs wait.
            if self.rng.random_bool(0.8) {
                node.wall_offset_ms += CLOCK_JUMP_MS_MAX;
            }
        }
    }

    /// From now on nothing new is deployed.
    pub(crate) fn close(&mut self) {
        self.deployer.close();
    }

    /// What is not yet as the control plane wants it; `None` when everything is.
    pub(crate) fn unsettled(&self, now_ms: u64, hosts: &[Host]) -> Result<Option<String>, String> {
        if !self.deployer.is_quiet() {
            return Ok(Some("a deployment waits for its answer".to_owned()));
        }
        if !now_ms.is_multiple_of(LOOK_EVERY_MS) {
            return Ok(Some("it is not the time to look".to_owned()));
        }
        let Some(member) = hosts.iter().find_map(|host| host.member()) else {
            return Ok(Some("no member runs".to_owned()));
        };
        for node in &self.nodes {
            if let Some(reason) = node_checks::unsettled(node, member.store())? {
                return Ok(Some(format!("node {}: {reason}", node.number)));
            }
        }
        Ok(None)
    }

    /// By a member's history.
    pub(crate) fn judge(&self, store: &holdfast_store::Store) -> Result<(), String> {
        self.watch.judge(store)
    }
}
