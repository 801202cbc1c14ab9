//! Random commands, valid and not: what holds for every history.

use super::exec;
use super::world::*;
use crate::database::{EVENTS, VIEWS};
use crate::event_bytes;
use crate::rows::Rows;
use crate::tables::FORM;
use crate::{DIGEST_EVERY, Store, StoreError, Views};
use holdfast_model::command::{AgentRef, Joiner};
use holdfast_model::exec::ExecEnd;
use holdfast_model::resource::{Capacity, EnrolmentKind, InstanceState, RouteTarget, TokenKind};
use holdfast_model::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Draws commands about things that exist, things that do not, and things of others.
struct Drawer {
    rng: StdRng,
    tenants: Vec<Tenant>,
    nodes: Vec<NodeId>,
    releases: Vec<(EnvId, ReleaseId)>,
    routes: Vec<RouteId>,
    drawn: u64,
}

impl Drawer {
    fn new(seed: u64, world: &mut World) -> Self {
        let tenants = vec![world.tenant("acme", 10), world.tenant("other", 11)];
        let nodes = vec![world.node("n1", 2_048), world.node("n2", 2_048)];
        Self { rng: StdRng::seed_from_u64(seed), tenants, nodes, releases: vec![], routes: vec![], drawn: 0 }
    }

    fn one<T: Copy>(&mut self, from: &[T], bad: T) -> T {
        if from.is_empty() || self.rng.random_range(0..10) == 0 {
            bad
        } else {
            from[self.rng.random_range(0..from.len())]
        }
    }

    fn number(&mut self) -> u64 {
        self.drawn += 1;
        self.drawn
    }

    fn env(&mut self) -> EnvId {
        let envs: Vec<_> = self.tenants.iter().map(|t| t.env).collect();
        self.one(&envs, EnvId::from_bits(1))
    }

    fn node(&mut self) -> NodeId {
        let nodes = self.nodes.clone();
        self.one(&nodes, NodeId::from_bits(1))
    }

    fn command(&mut self, world: &World) -> Command {
        let env = self.env();
        let orgs: Vec<_> = self.tenants.iter().map(|t| t.org).collect();
        let org = self.one(&orgs, OrgId::from_bits(1));
        let few = self.rng.random_range(0..6u32);
        match self.rng.random_range(0..20) {
            0 => Command::CreateApp { org, name: format!("app-{few}").parse().unwrap() },
            1 => {
                let apps: Vec<_> = self.tenants.iter().map(|t| t.app).collect();
                Command::CreateEnv {
                    app: self.one(&apps, AppId::from_bits(1)),
                    name: format!("env-{few}").parse().unwrap(),
                }
            }
            2 => Command::CreateOrg { name: format!("org-{few}").parse().unwrap() },
            3 | 4 => Command::CreateRelease { env, image: image(few as u8), manifest: manifest("hello", "") },
            5 | 6 => {
                let releases = self.releases.clone();
                let (of, release) = self.one(&releases, (env, ReleaseId::from_bits(1)));
                Command::Deploy { env: of, release, counts: counts(few) }
            }
            7 => Command::Scale { env, counts: counts(few) },
            8 | 9 => route(env, &format!("host-{few}.example.com")),
            10 => tcp_route(env, 443 + few as u16),
            11 => {
                let routes = self.routes.clone();
                Command::DeleteRoute {
                    route: self.one(&routes, RouteId::from_bits(1)),
                    expected_version: None,
                }
            }
            12 => {
                let digest = Digest::of(&self.number().to_be_bytes());
                Command::CreateEnrolment {
                    kind: EnrolmentKind::Node,
                    digest,
                    ttl_ms: 10_000 * u64::from(few),
                }
            }
            13 => Command::Enrol {
                digest: Digest::of(&u64::from(few).to_be_bytes()),
                key: Digest([few as u8; 32]),
                joiner: Joiner::Node {
                    name: format!("late-{few}").parse().unwrap(),
                    capacity: Capacity { memory_mib: 1_024, cpu_milli: 4_000 },
                },
            },
            14 => {
                let node = self.node();
                match few {
                    0 => Command::DrainNode { node },
                    1 => Command::ReportSilence {
                        silent: BTreeMap::from([(node, world.now)]),
                        back: BTreeSet::new(),
                    },
                    2 => Command::ReportSilence { silent: BTreeMap::new(), back: BTreeSet::from([node]) },
                    3 => Command::ConfirmRemovals {
                        agent: AgentRef::Node(node),
                        through: Revision(self.number()),
                    },
                    _ => Command::ActivateNode { node },
                }
            }
            15 => match few {
                0 => Command::AdvanceLogTime { by_ms: u64::from(self.rng.random_range(0..70_000u32)) },
                1 => Command::RaiseClusterVersion { to: ClusterVersion(self.rng.random_range(0..4)) },
                _ => Command::Tick,
            },
            16 if few == 0 => {
                Command::CreateToken(token(100 + few as u8, TokenKind::Org(org), &[Scope::AppsRead]))
            }
            16 => self.exec(world),
            17 if few == 0 => Command::DeleteApp { app: AppId::from_bits(2), expected_version: None },
            _ => {
                let node = self.node();
                let mut observations = Vec::new();
                for instance in world.view().node_instances_live(node).unwrap() {
                    let states = [
                        InstanceState::Ready,
                        InstanceState::Ready,
                        InstanceState::Stopped,
                        InstanceState::Failed,
                    ];
                    observations.push(seen(instance.id, states[self.rng.random_range(0..states.len())]));
                }
                Command::ReportInstances { node, observations }
            }
        }
    }

    /// Something about a program in an instance, or about one of the grants that there are.
    fn exec(&mut self, world: &World) -> Command {
        let nodes = self.nodes.clone();
        let live = nodes.iter().flat_map(|node| world.view().node_instances_live(*node).unwrap());
        let instances: Vec<_> = live.map(|instance| instance.id).collect();
        let grants: Vec<_> = world.view().exec_grants(100).unwrap().iter().map(|grant| grant.id).collect();
        let (digest, kind) = (self.rng.random_range(0..2), self.rng.random_range(0..4));
        match kind {
            0 | 1 => exec::create(self.one(&instances, InstanceId::from_bits(1)), digest),
            2 => exec::use_up(self.one(&grants, ExecGrantId::from_bits(1)), digest),
            _ => exec::end(self.one(&grants, ExecGrantId::from_bits(1)), ExecEnd::Exited),
        }
    }

    fn context(&mut self, world: &mut World, command: &Command) -> Context {
        let clockwork = is_clockwork(command);
        let context = if clockwork {
            world.context(Actor::System(MemberId(1)), None)
        } else if let Command::ReportInstances { node, .. } = command {
            world.context(Actor::Node(*node), None)
        } else if self.rng.random_range(0..3) == 0 {
            let tenant = self.tenants[self.rng.random_range(0..self.tenants.len())];
            world.context(Actor::Token(tenant.token), Some(tenant.org))
        } else {
            world.context(Actor::Operator(world.operator), None)
        };
        let keyed = self.rng.random_range(0..3) == 0;
        let key = format!("key-{}", self.rng.random_range(0..40));
        Context { idempotency_key: keyed.then_some(key), ..context }
    }

    fn learn(&mut self, command: &Command, outcome: &Outcome) {
        match (command, outcome) {
            (Command::CreateRelease { env, .. }, Ok(Accepted { output: Output::Release(id), .. })) => {
                self.releases.push((*env, *id));
            }
            (_, Ok(Accepted { output: Output::Route(id), .. })) => self.routes.push(*id),
            _ => {}
        }
    }
}

/// Commands that only a leader's clockwork gives, and that change nothing when they are repeated, or little.
fn is_clockwork(command: &Command) -> bool {
    matches!(
        command,
        Command::Tick
            | Command::ReportSilence { .. }
            | Command::AdvanceLogTime { .. }
            | Command::RaiseClusterVersion { .. }
    )
}

/// At most one route has a hostname, and it is the one that the claim leads to.
fn check_hostnames(world: &World) {
    let view = world.view();
    let mut owners = BTreeMap::new();
    for route in view.all_routes(None, 10_000).unwrap() {
        if let RouteTarget::TlsPassthrough { hostname } = &route.target {
            assert_eq!(owners.insert(hostname.clone(), route.id), None, "two routes have {hostname}");
            assert_eq!(view.route_by_hostname(hostname).unwrap().unwrap().id, route.id);
        }
    }
}

/// No node has more instances than it has room for, and its load is what its instances take.
fn check_loads(world: &World) {
    let view = world.view();
    for node in view.nodes().unwrap() {
        let live = view.node_instances_live(node.id).unwrap();
        let load = view.node_load(node.id).unwrap();
        assert_eq!(load.instances, live.len() as u64);
        let memory: u64 = live.iter().map(|i| i.memory_mib + limits::VMM_OVERHEAD_MIB).sum();
        assert_eq!(load.memory_mib, memory);
        assert!(memory <= node.capacity.memory_mib);
    }
}

pub(super) fn random_history(seed: u64, steps: usize) -> World {
    println!("seed {seed}");
    let mut world = World::at(ClusterVersion(1 + (seed % 3) as u32));
    let mut drawer = Drawer::new(seed, &mut world);
    let mut accepted = 0;
    for step in 0..steps {
        world.now = world.now.plus_ms(drawer.rng.random_range(0..3_000));
        let command = drawer.command(&world);
        let context = drawer.context(&mut world, &command);
        let before = (world.store.views_digest(), world.store.revision());
        let outcome = world.propose(context.clone(), command.clone());
        let after = (world.store.views_digest(), world.store.revision());
        match &outcome {
            Ok(_) => accepted += 1,
            // i14: what is rejected leaves the state as it was.
            Err(rejection) => {
                assert_eq!(before, after, "seed {seed}, step {step}: {command:?}: {rejection}");
                assert!(!rejection.message.is_empty());
            }
        }
        // i04: the same again gives the same and changes nothing.
        if !is_clockwork(&command) && !matches!(command, Command::ReportInstances { .. }) {
            assert_eq!(world.propose(context, command.clone()), outcome, "seed {seed}, step {step}");
            assert_eq!((world.store.views_digest(), world.store.revision()), after);
        }
        drawer.learn(&command, &outcome);
    }
    check_hostnames(&world);
    check_loads(&world);
    assert!(accepted > steps / 4, "seed {seed}: only {accepted} of {steps} were accepted");
    world
}

#[test]
fn i14_i13_i08_i04_random_histories_keep_the_invariants() {
    for seed in 0..12 {
        let world = random_history(seed, 250);
        world.check();
    }
}

#[test]
fn i01_the_same_log_gives_the_same_state_however_it_is_cut_into_batches() {
    for seed in 100..104u64 {
        let world = random_history(seed, 150);
        let mut rng = StdRng::seed_from_u64(seed);
        let other = memory_store();
        let mut at = 0;
        while at < world.log.len() {
            let end = (at + rng.random_range(1..40)).min(world.log.len());
            other.apply(LogIndex(at as u64), &world.log[at..end], b"meta").unwrap();
            at = end;
        }
        assert_eq!(other.digest(), world.store.digest(), "seed {seed}");
        assert_eq!(other.revision(), world.store.revision());
        assert_eq!(other.recorded_digest().unwrap(), world.store.recorded_digest().unwrap());
    }
}

#[test]
fn i01_an_entry_of_several_proposals_does_what_one_entry_each_does() {
    for seed in 110..113u64 {
        let world = random_history(seed, 150);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut proposals = world.log.iter().flatten().cloned().peekable();
        let (grouped, single) = (memory_store(), memory_store());
        let mut index = LogIndex(0);
        let mut next = LogIndex(0);
        while proposals.peek().is_some() {
            let count = rng.random_range(0..30);
            let entry: Vec<_> = proposals.by_ref().take(count).collect();
            let alone: Vec<_> = entry.iter().map(|p| vec![p.clone()]).collect();
            let together = grouped.apply(index, std::slice::from_ref(&entry), b"meta").unwrap();
            let one_each = single.apply(next, &alone, b"meta").unwrap();
            assert_eq!(together, [one_each.concat()], "seed {seed}");
            index = index.next();
            next = LogIndex(next.0 + alone.len() as u64);
        }
        assert_eq!(grouped.digest(), world.store.digest(), "seed {seed}");
        assert_eq!(single.digest(), world.store.digest(), "seed {seed}");
    }
}

/// Outcomes end while a batch is under way, and members' clocks differ: what is forgotten follows from the log alone.
#[test]
fn i01_outcomes_are_forgotten_alike_however_the_log_is_cut_into_batches() {
    for seed in 200..208u64 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut world = World::at(ClusterVersion(1 + (seed % 2) as u32));
        // Some histories rise to log time half-way.
        let raised_at = (seed % 4 == 0).then_some(100);
        for n in 0..200 {
            let step = i64::from(rng.random_range(-20_000..60_000i32)) * i64::from(rng.random_bool(0.7));
            world.now = Timestamp(world.now.0.saturating_add_signed(step));
            let context = world.context(Actor::Operator(world.operator), None);
            let name = format!("org-{n}").parse().unwrap();
            world.propose(context, Command::CreateOrg { name }).unwrap();
            if raised_at == Some(n) {
                world.system(Command::RaiseClusterVersion { to: ClusterVersion::TWO }).unwrap();
            }
            if world.store.cluster_version().has_log_time() {
                world.log_time_passes(rng.random_range(0..40_000));
            }
        }
        assert!(
            raised_at.is_some() || kept_outcomes(&world.store) < 150,
            "seed {seed}: {}",
            kept_outcomes(&world.store)
        );
        let other = memory_store();
        let mut at = 0;
        while at < world.log.len() {
            let end = (at + rng.random_range(1..60)).min(world.log.len());
            other.apply(LogIndex(at as u64), &world.log[at..end], b"meta").unwrap();
            at = end;
        }
        assert_eq!(kept_outcomes(&other), kept_outcomes(&world.store), "seed {seed}");
        assert_eq!(other.digest(), world.store.digest(), "seed {seed}");
    }
}

#[test]
fn i13_views_are_rebuilt_from_the_events_up_to_any_revision() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    let mut at = vec![(world.store.revision(), world.store.views_digest())];
    world.node("n1", 4_096);
    let release = world.release(&a, 1);
    at.push((world.store.revision(), world.store.views_digest()));
    world.deploy(&a, release);
    world.settle(a.env);
    at.push((world.store.revision(), world.store.views_digest()));
    for (revision, views) in at {
        assert_eq!(world.store.replay_to(revision).unwrap().views, views);
    }
    let digest = world.store.digest();
    let rebuilt = world.store.rebuild().unwrap();
    assert_eq!((rebuilt.revision, world.store.digest()), (world.store.revision(), digest));
    world.check();
    let beyond = world.store.revision().next();
    assert!(matches!(world.store.replay_to(beyond), Err(StoreError::NoSuchRevision { .. })));
    // It goes on as if nothing had been.
    world.deploy(&a, release);
    world.check();
}

/// Fills a log until a digest was recorded, and returns where.
fn recorded(world: &mut World) -> (LogIndex, Digest) {
    for n in 0..2 * DIGEST_EVERY {
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
    }
    world.store.recorded_digest().unwrap().unwrap()
}

#[test]
fn i01_a_digest_that_differs_stops_the_member() {
    let mut world = World::new();
    let (at, digest) = recorded(&mut world);
    assert_eq!(world.store.digest_at(at).unwrap(), Some(digest));
    world.system(Command::VerifyDigest { at, digest }).unwrap();
    // What is not recorded here cannot be compared here.
    world.system(Command::VerifyDigest { at: LogIndex(1), digest: Digest([3; 32]) }).unwrap();
    // Only members may say such things.
    let lie = Command::VerifyDigest { at, digest: Digest([3; 32]) };
    assert_eq!(code(world.operator(lie.clone())), Code::Unauthenticated);
    let revision = world.store.revision();
    let context = world.context(Actor::System(MemberId(1)), None);
    let entry = vec![Proposal { context, command: lie }];
    let index = LogIndex(world.log.len() as u64);
    let error = world.store.apply(index, std::slice::from_ref(&entry), b"").unwrap_err();
    assert!(matches!(error, StoreError::Diverged { ours, .. } if ours == digest));
    assert_eq!(world.store.revision(), revision);
    assert!(matches!(world.store.apply(index, &[vec![]], b""), Err(StoreError::OutOfService)));
}

#[test]
fn i01_entries_come_in_order_and_once() {
    let store: Store = memory_store();
    store.apply(LogIndex(3), &[vec![], vec![]], b"m").unwrap();
    assert_eq!(store.applied(), Some(LogIndex(4)));
    let error = store.apply(LogIndex(4), &[vec![]], b"n").unwrap_err();
    assert!(matches!(error, StoreError::OutOfOrder { applied: LogIndex(4), got: LogIndex(4) }));
    assert_eq!(store.raft_meta().unwrap().as_deref(), Some(&b"m"[..]));
}

#[test]
fn i12_events_name_who_what_and_why() {
    let mut world = World::new();
    world.node("n1", 4_096);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    let before = world.store.revision();
    let deployment = world.deploy(&a, release);
    let events = world.view().events(before, 100, Some(a.org)).unwrap().events;
    assert_eq!(events[0].payload.kind(), "deployment_started");
    assert_eq!(events[0].causation, None);
    for event in &events {
        assert_eq!(event.actor, Actor::Token(a.token));
        assert_eq!(event.correlation, Some(deployment));
        assert_eq!(event.org, Some(a.org));
    }
    assert!(events[1..].iter().all(|e| e.causation == Some(events[0].revision)));
    assert_eq!(world.view().chain(), events.last().unwrap().chain);
    let other = world.tenant("other", 11);
    let theirs = world.view().events(before, 100, Some(other.org)).unwrap();
    assert!(theirs.events.iter().all(|e| e.org == Some(other.org)));
    assert_eq!(theirs.scanned_to, world.store.revision());
}

/// Writes an event over the stored one with its revision, or removes that one.
fn tamper(path: &Path, revision: u64, forged: Option<&[u8]>) {
    // As somebody would who knows that the checksums of the blocks lie beside.
    drop(std::fs::remove_file(holdfast_checked_file::sidecar_of(path)));
    let db = redb::Database::open(path).unwrap();
    let txn = db.begin_write().unwrap();
    {
        let mut events = txn.open_table(EVENTS).unwrap();
        match forged {
            Some(bytes) => events.insert(revision, bytes).unwrap(),
            None => events.remove(revision).unwrap(),
        };
    }
    txn.commit().unwrap();
}

#[test]
fn i12_nobody_edits_or_removes_an_event_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let mut world = World::with(Store::open(&path).unwrap());
    world.tenant("acme", 10);
    let events = world.view().events(Revision(0), usize::MAX, None).unwrap().events;
    world.store.checkpoint().unwrap();
    drop(world);
    let whole = std::fs::read(&path).unwrap();
    for at in [0, events.len() / 2, events.len() - 1] {
        let event = &events[at];
        let before = at.checked_sub(1).map_or(Digest([0; 32]), |at| events[at].chain);
        // Somebody else is to have done it: no view tells.
        let edited = Event { actor: Actor::Operator(TokenId::from_bits(66)), ..event.clone() };
        let unchained = postcard::to_extend(&edited, vec![FORM]).unwrap();
        // And chained to the event before it, as whoever knows the format would.
        let chained = event_bytes::seal(&mut Event { chain: before, ..edited }).unwrap();
        for (how, forged) in
            [("edited", Some(&unchained)), ("edited and chained", Some(&chained)), ("removed", None)]
        {
            std::fs::write(&path, &whole).unwrap();
            tamper(&path, event.revision.0, forged.map(Vec::as_slice));
            let found = Store::open(&path).unwrap().verify();
            assert!(matches!(found, Err(StoreError::Corrupt { .. })), "{}, {how}: {found:?}", event.revision);
        }
    }
    std::fs::write(&path, &whole).unwrap();
    // The same bytes again are no edit.
    let same = event_bytes::seal(&mut Event { chain: Digest([0; 32]), ..events[0].clone() }).unwrap();
    tamper(&path, 1, Some(&same));
    Store::open(&path).unwrap().verify().unwrap();
}

#[test]
fn i13_a_view_that_does_not_follow_from_the_events_is_noticed_and_made_anew() {
    // A short history, and one that is long enough for threads.
    for orgs in [0, 40] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let mut world = World::with(Store::open(&path).unwrap());
        let org = world.tenant("acme", 10).org;
        for n in 0..orgs {
            world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
        }
        world.store.checkpoint().unwrap();
        let rows = |store: &Store| -> Vec<_> {
            let view = store.view().unwrap();
            let of = |table: &crate::Table| view.scan(&[*table as u8], None, usize::MAX).unwrap();
            crate::Table::ALL.iter().flat_map(of).collect()
        };
        let right = rows(&world.store);
        drop(world);
        let row = crate::tables::key(crate::Table::Org, &[&org.to_key()]);
        let unknown = crate::tables::key(crate::Table::Org, &[&[9; 16]]);
        for (wrong, value) in [(&row, None), (&row, Some([1, 2])), (&unknown, Some([1, 2]))] {
            drop(std::fs::remove_file(holdfast_checked_file::sidecar_of(&path)));
            let db = redb::Database::open(&path).unwrap();
            let txn = db.begin_write().unwrap();
            {
                let mut views = txn.open_table(VIEWS).unwrap();
                match value {
                    Some(value) => drop(views.insert(wrong.as_slice(), value.as_slice()).unwrap()),
                    None => drop(views.remove(wrong.as_slice()).unwrap()),
                }
            }
            txn.commit().unwrap();
            drop(db);
            let store = Store::open(&path).unwrap();
            assert_ne!(rows(&store), right);
            assert!(matches!(store.verify(), Err(StoreError::Corrupt { .. })));
            store.rebuild().unwrap();
            assert_eq!(rows(&store), right, "{orgs} orgs, {value:?}");
            store.verify().unwrap();
        }
    }
}
