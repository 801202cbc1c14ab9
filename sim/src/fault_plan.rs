//! Which faults come when. Each seed draws its own set of kinds, because a run in which everything happens at once finds
//! less than many in which a few things happen often.

use rand::RngExt;
use rand::rngs::StdRng;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// Some paths are blocked for a while.
    Partition,
    /// One process is killed, and comes back.
    Kill,
    /// One host loses power in the middle of a write, and comes back.
    PowerLoss,
    /// Every host loses power at once.
    Blackout,
    /// Delays and losses change.
    Weather,
    /// One disk is slow for a while.
    SlowDisk,
    /// One disk is full for a while.
    FullDisk,
    /// One disk fails to sync once.
    FailedSync,
    /// A wall clock jumps.
    ClockJump,
    /// The leader is asked to hand over.
    Transfer,
    /// A member makes a snapshot now.
    Snapshot,
    /// A voter is made a learner and a voter again.
    Membership,
    /// Bits rot in one member's state.
    BitRot,
}

const ALL: [FaultKind; 12] = [
    FaultKind::Partition,
    FaultKind::Kill,
    FaultKind::PowerLoss,
    FaultKind::Blackout,
    FaultKind::Weather,
    FaultKind::SlowDisk,
    FaultKind::FullDisk,
    FaultKind::FailedSync,
    FaultKind::ClockJump,
    FaultKind::Transfer,
    FaultKind::Snapshot,
    FaultKind::Membership,
];

/// Nodes of a run that has some.
const NODES: usize = 2;

/// What one seed's run is like.
#[derive(Clone, Debug)]
pub(crate) struct FaultPlan {
    /// Members of the cluster.
    pub(crate) members: u64,
    /// Nodes with agents.
    pub(crate) nodes: usize,
    /// Clients.
    pub(crate) clients: usize,
    /// How long clients think at most, in milliseconds.
    pub(crate) think_ms: u64,
    /// How long faults come, in milliseconds.
    pub(crate) faults_ms: u64,
    /// Entries after which a snapshot is made.
    pub(crate) snapshot_entries: u64,
    /// Entries that are kept beside it.
    pub(crate) kept_entries: u64,
    /// What happens.
    pub(crate) kinds: Vec<FaultKind>,
    /// Between two faults at most, in milliseconds.
    pub(crate) pause_ms: u64,
}

impl FaultPlan {
    /// Draws a run.
    pub(crate) fn draw(rng: &mut StdRng) -> Self {
        let mut kinds: Vec<FaultKind> = ALL.into_iter().filter(|_| rng.random_bool(0.5)).collect();
        if kinds.is_empty() {
            kinds = vec![FaultKind::Partition, FaultKind::Kill];
        }
        let mut plan = FaultPlan {
            members: if rng.random_bool(0.75) { 3 } else { 5 },
            nodes: 0,
            clients: rng.random_range(3..8),
            think_ms: rng.random_range(10..250),
            faults_ms: rng.random_range(6_000..14_000),
            snapshot_entries: rng.random_range(20..400),
            kept_entries: rng.random_range(5..100),
            kinds,
            pause_ms: rng.random_range(200..2000),
        };
        // Three of ten, without another draw: the other seeds stay what they were.
        if plan.pause_ms % 10 < 3 {
            plan.kinds.push(FaultKind::BitRot);
        }
        // Every other one, likewise.
        if plan.think_ms.is_multiple_of(2) {
            plan.nodes = NODES;
        }
        plan
    }

    /// The next fault.
    pub(crate) fn next(&self, rng: &mut StdRng) -> FaultKind {
        self.kinds[rng.random_range(0..self.kinds.len())]
    }
}
