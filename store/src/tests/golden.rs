//! Bytes that earlier builds stored, and what they must come to: `store/golden/README.md` says how they were made.

mod fourth;
mod third;

use super::world::*;
use crate::{Store, Views};
use holdfast_model::command::{AgentRef, Joiner, NewMember};
use holdfast_model::limits::LOG_TIME_STEP_MS_MAX;
use holdfast_model::resource::{Capacity, EnrolmentKind, InstanceState, TokenKind};
use holdfast_model::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Set to write `v2`, `v3` and `v4` anew instead of comparing with them. What was released is never written anew.
const BLESS: &str = "HOLDFAST_BLESS";

fn folder(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(version)
}

fn read(version: &str, file: &str) -> String {
    std::fs::read_to_string(folder(version).join(file)).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Everything that can be asked, once at least, in an order in which most of it is accepted.
pub(super) fn scenario(world: &mut World) {
    let a = world.tenant("acme", 10);
    let b = world.tenant("other", 11);
    let more = Command::CreateToken(token(12, TokenKind::Org(a.org), &[Scope::AppsRead]));
    let Output::Token(short) = world.operator(more).unwrap().output else { panic!("no token") };
    let first = world.node("n1", 768);
    let second = world.node("n2", 768);
    let describe = Command::ReportNode {
        node: second,
        capacity: Capacity { memory_mib: 800, cpu_milli: 8_000 },
        vmm: "qemu-tcg: qemu-tcg boots in 600 ms".into(),
    };
    world.as_actor(Actor::Node(second), None, describe).unwrap();
    let edge = enrol(world, EnrolmentKind::Edge, 1, Joiner::Edge { name: "e1".parse().unwrap() });
    let member = |n: u8| {
        let (raft_addr, api_addr) = (format!("10.0.0.{n}:7444"), format!("10.0.0.{n}:7443"));
        Joiner::Member(NewMember { name: format!("m{n}").parse().unwrap(), raft_addr, api_addr })
    };
    enrol(world, EnrolmentKind::Member, 2, member(2)).unwrap();
    enrol(world, EnrolmentKind::Learner, 3, member(3)).unwrap();
    enrol(world, EnrolmentKind::Member, 2, member(4)).unwrap();
    world.operator(Command::SetMemberVotes { member: MemberId(3), votes: true }).unwrap();
    world.operator(Command::SetMemberVotes { member: MemberId(2), votes: false }).unwrap();
    world.operator(Command::RemoveMember { member: MemberId(2) }).unwrap();

    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(5) }).unwrap();
    world.settle(a.env);
    // More than the nodes have room for, and back.
    for wanted in [20, 5] {
        world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(wanted) }).unwrap();
        world.tick_after(2_000);
        world.settle(a.env);
    }
    let failing = world.live(a.env)[0].clone();
    world.report(&failing, InstanceState::Failed);
    world.tick_after(60_000);
    world.settle(a.env);
    let next = world.release(&a, 2);
    world.deploy(&a, next);
    world.settle(a.env);
    let made = world.tenant_asks(&a, route(a.env, "www.example.com")).unwrap();
    world.tenant_asks(&b, route(b.env, "www.example.com")).unwrap_err();
    world.tenant_asks(&a, tcp_route(a.env, 5_432)).unwrap();
    let Output::Route(made) = made.output else { panic!("no route") };
    let delete = Command::DeleteRoute { route: made, expected_version: Some(1) };
    world.tenant_asks(&a, delete.clone()).unwrap();
    world.tenant_asks(&a, delete).unwrap_err();

    let now = world.now;
    let silent = Command::ReportSilence { silent: BTreeMap::from([(first, now)]), back: BTreeSet::new() };
    world.system(silent).unwrap();
    world.tick_after(30_000);
    let back = Command::ReportSilence { silent: BTreeMap::new(), back: BTreeSet::from([first]) };
    world.system(back).unwrap();
    world.operator(Command::DrainNode { node: first }).unwrap();
    world.tick_after(2_000);
    world.settle(a.env);
    world.operator(Command::ActivateNode { node: first }).unwrap();
    let through = world.store.revision();
    world.operator(Command::ConfirmRemovals { agent: AgentRef::Node(first), through }).unwrap();
    let Ok(Accepted { output: Output::Enrolled(resource::Enrolled::Edge(edge)), .. }) = edge else {
        panic!("no edge")
    };
    world.operator(Command::ConfirmRemovals { agent: AgentRef::Edge(edge), through }).unwrap();
    let (at, digest) = (LogIndex(16), world.store.digest_at(LogIndex(16)).unwrap().unwrap());
    world.system(Command::VerifyDigest { at, digest }).unwrap();
    for name in ["keyed", "keyed", "with-the-same-key"] {
        let context = world.context(Actor::Token(a.token), Some(a.org));
        let source = Some("192.0.2.7".parse().unwrap());
        let context = Context { idempotency_key: Some("one-key".into()), source, ..context };
        let _ = world.propose(context, Command::CreateApp { org: a.org, name: name.parse().unwrap() });
    }
    world.operator(Command::RevokeToken { token: short }).unwrap();
    world
        .as_actor(Actor::Token(short), Some(a.org), Command::Scale { env: a.env, counts: counts(1) })
        .unwrap_err();
    world.tenant_asks(&b, Command::DeleteApp { app: b.app, expected_version: None }).unwrap();
    // Clocks differ, and outcomes end.
    for minutes in [11, 0, 3_000] {
        world.now = START.plus_ms(minutes * 60_000);
        world.operator(Command::CreateOrg { name: format!("after-{minutes}").parse().unwrap() }).unwrap();
    }
    let begin = Command::BeginIncarnation { incarnation: Incarnation(2), survivor: MemberId(1) };
    world.system(begin).unwrap();
}

fn enrol(world: &mut World, kind: EnrolmentKind, secret: u8, joiner: Joiner) -> Outcome {
    let digest = Digest([secret; 32]);
    let create = Command::CreateEnrolment { kind, digest, ttl_ms: 60_000 };
    // One secret lets in once: the second time it is there already.
    let _ = world.operator(create);
    let id = world.view().enrolment_by_digest(&digest).unwrap().unwrap().id;
    world.as_actor(Actor::Enrolling(id), None, Command::Enrol { digest, key: Digest([secret; 32]), joiner })
}

/// A kind's name, its bytes and what they mean, three lines each.
fn line_up(what: impl Iterator<Item = (String, Vec<u8>, String)>) -> String {
    what.fold(String::new(), |mut text, (name, bytes, json)| {
        writeln!(text, "{name}\n{}\n{json}", hex(&bytes)).unwrap();
        text
    })
}

fn name_of(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value).unwrap() {
        serde_json::Value::String(name) => name,
        serde_json::Value::Object(map) => map.keys().next().unwrap().clone(),
        other => panic!("not an enum: {other}"),
    }
}

fn commands(world: &World) -> String {
    line_up(world.log.iter().flatten().map(|proposal| {
        let json = serde_json::to_string(proposal).unwrap();
        (name_of(&proposal.command), postcard::to_stdvec(proposal).unwrap(), json)
    }))
}

fn events(store: &Store) -> String {
    let events = store.view().unwrap().events(Revision(0), usize::MAX, None).unwrap().events;
    line_up(events.into_iter().map(|event| {
        let mut sealed = event.clone();
        // `seal` wants the chain before it.
        sealed.chain = match event.revision.0 {
            1 => Digest::default(),
            n => store.view().unwrap().event(Revision(n - 1)).unwrap().unwrap().chain,
        };
        let bytes = crate::event_bytes::seal(&mut sealed).unwrap();
        assert_eq!(sealed, event);
        (event.payload.kind().to_owned(), bytes, serde_json::to_string(&event).unwrap())
    }))
}

/// Where the state is after each command, and what each was answered.
fn digests(log: &[Proposal]) -> String {
    let store = memory_store();
    let mut text = String::new();
    for (index, proposal) in (0..).map(LogIndex).zip(log) {
        let outcome = apply_one(&store, index, proposal.clone());
        let outcome = serde_json::to_string(&outcome).unwrap();
        writeln!(text, "{index} {} {} {} {outcome}", store.revision(), store.digest(), store.views_digest())
            .unwrap();
    }
    text
}

fn apply_one(store: &Store, index: LogIndex, proposal: Proposal) -> Outcome {
    store.apply(index, &[vec![proposal]], b"golden").unwrap().remove(0).remove(0)
}

/// The proposals of a file of commands, after a look at each: it is what it was, and is written as it was.
fn read_commands(version: &str) -> Vec<Proposal> {
    let text = read(version, "commands.txt");
    let lines: Vec<_> = text.lines().collect();
    let read = lines.chunks(3).map(|lines| {
        let stored = bytes(lines[1]);
        let proposal: Proposal = postcard::from_bytes(&stored).unwrap();
        assert_eq!(serde_json::to_string(&proposal).unwrap(), lines[2]);
        assert_eq!(hex(&postcard::to_stdvec(&proposal).unwrap()), lines[1], "{}", lines[0]);
        proposal
    });
    read.collect()
}

fn check_events(version: &str, store: &Store) {
    let text = read(version, "events.txt");
    for lines in text.lines().collect::<Vec<_>>().chunks(3) {
        let event = crate::event_bytes::open(&bytes(lines[1])).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), lines[2]);
    }
    assert_eq!(events(store), text, "the same commands make the same events, byte for byte");
}

/// Every kind of event and command has its bytes here: `names` are those that the scenario must have.
fn check_complete(version: &str, file: &str, names: &[&str]) {
    let text = read(version, file);
    let found: BTreeSet<&str> = text.lines().step_by(3).collect();
    assert_eq!(found, names.iter().copied().collect::<BTreeSet<_>>(), "{version}/{file}");
}

const COMMANDS_V1: &[&str] = &[
    "ActivateNode",
    "BeginIncarnation",
    "ConfirmRemovals",
    "CreateApp",
    "CreateEnrolment",
    "CreateEnv",
    "CreateOrg",
    "CreateRelease",
    "CreateRoute",
    "CreateToken",
    "DeleteApp",
    "DeleteRoute",
    "Deploy",
    "DrainNode",
    "Enrol",
    "InitCluster",
    "RemoveMember",
    "ReportInstances",
    "ReportNode",
    "ReportSilence",
    "RevokeToken",
    "Scale",
    "SetMemberVotes",
    "Tick",
    "VerifyDigest",
];

/// The kinds of events that version 1 had.
const EVENTS_V1: &[&str] = &[
    "app_created",
    "app_deleted",
    "cluster_initialised",
    "deployment_blocked",
    "deployment_started",
    "deployment_state_changed",
    "edge_enrolled",
    "enrolment_created",
    "enrolment_used",
    "env_created",
    "incarnation_began",
    "instance_placed",
    "instance_state_changed",
    "member_enrolled",
    "member_removed",
    "member_votes_changed",
    "node_described",
    "node_enrolled",
    "node_state_changed",
    "org_created",
    "release_created",
    "removals_confirmed",
    "route_created",
    "route_deleted",
    "token_created",
    "token_revoked",
];

/// The commands that version 2 has, where a cluster begins otherwise.
const COMMANDS_V2: &[&str] = &[
    "ActivateNode",
    "AdvanceLogTime",
    "BeginCluster",
    "BeginIncarnation",
    "ConfirmRemovals",
    "CreateApp",
    "CreateEnrolment",
    "CreateEnv",
    "CreateOrg",
    "CreateRelease",
    "CreateRoute",
    "CreateToken",
    "DeleteApp",
    "DeleteRoute",
    "Deploy",
    "DrainNode",
    "Enrol",
    "RaiseClusterVersion",
    "RemoveMember",
    "ReportInstances",
    "ReportNode",
    "ReportSilence",
    "RevokeToken",
    "Scale",
    "SetMemberVotes",
    "Tick",
    "VerifyDigest",
];

/// A history at version 2 does all that one at version 1 does, and what only it can.
fn scenario_v2(world: &mut World) {
    scenario(world);
    world.system(Command::RaiseClusterVersion { to: ClusterVersion::TWO }).unwrap();
    world.log_time_passes(LOG_TIME_STEP_MS_MAX + 1_234);
    world.operator(Command::CreateOrg { name: "by-log-time".parse().unwrap() }).unwrap();
}

/// The same history, begun at version 1 and raised: its outcomes end by both kinds of time.
fn raised(log: &[Proposal]) -> Store {
    raised_by(log, ClusterVersion::TWO, &[Command::AdvanceLogTime { by_ms: 5_000 }])
}

/// A history of the version before, raised to this one, and what is asked for after that.
fn raised_by(log: &[Proposal], to: ClusterVersion, after: &[Command]) -> Store {
    let store = memory_store();
    let mut world = World::at(ClusterVersion(to.0 - 1));
    let more = std::iter::once(Command::RaiseClusterVersion { to }).chain(after.iter().cloned());
    let more = more.map(|command| {
        let context = world.context(Actor::System(MemberId(1)), None);
        Proposal { context: Context { request_id: RequestId::from_bits(1 << 100), ..context }, command }
    });
    for (index, proposal) in (0..).map(LogIndex).zip(log.iter().cloned().chain(more)) {
        let _ = apply_one(&store, index, proposal);
    }
    store
}

#[test]
fn i01_i13_what_version_1_wrote_is_read_and_written_the_same() {
    let log = read_commands("v1");
    check_complete("v1", "commands.txt", COMMANDS_V1);
    check_complete("v1", "events.txt", EVENTS_V1);
    assert_eq!(digests(&log), read("v1", "digests.txt"), "every command comes to what it came to");

    let copy = tempfile::tempdir().unwrap();
    let path = copy.path().join("state.redb");
    std::fs::copy(folder("v1").join("state.redb"), &path).unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!((store.cluster_version(), store.log_time_ms()), (ClusterVersion::ONE, 0));
    let end = read("v1", "digests.txt").lines().last().unwrap().to_owned();
    let stands = |store: &Store| {
        let applied = store.applied().unwrap();
        format!("{applied} {} {} {} ", store.revision(), store.digest(), store.views_digest())
    };
    assert!(end.starts_with(&stands(&store)), "{end}");
    store.verify().unwrap();
    check_events("v1", &store);
    store.rebuild().unwrap();
    assert!(end.starts_with(&stands(&store)), "{end}");

    let installed = memory_store();
    installed.install(&mut std::fs::File::open(folder("v1").join("state.snapshot")).unwrap()).unwrap();
    assert!(end.starts_with(&stands(&installed)), "{end}");
    installed.verify().unwrap();
    let mut written = Vec::new();
    store.snapshot().unwrap().write_to(&mut written).unwrap();
    assert_eq!(written, std::fs::read(folder("v1").join("state.snapshot")).unwrap());
}

/// Compares a text with the file that has it, or writes the file when it is asked for.
fn compare(version: &str, file: &str, text: &str) {
    if std::env::var_os(BLESS).is_some() {
        std::fs::create_dir_all(folder(version)).unwrap();
        std::fs::write(folder(version).join(file), text).unwrap();
    }
    assert_eq!(text, read(version, file), "{version}/{file}");
}

/// What a world did, against the files of its version, of which it must have every command and event.
fn check_version<'a>(
    version: &str,
    world: &World,
    commands_of: impl Iterator<Item = &'a &'a str>,
    events_of: impl Iterator<Item = &'a &'a str>,
) {
    world.check();
    let log: Vec<Proposal> = world.log.iter().flatten().cloned().collect();
    let came_to = digests(&log);
    compare(version, "commands.txt", &commands(world));
    compare(version, "events.txt", &events(&world.store));
    compare(version, "digests.txt", &came_to);
    check_complete(version, "commands.txt", &commands_of.copied().collect::<Vec<_>>());
    check_complete(version, "events.txt", &events_of.copied().collect::<Vec<_>>());
    assert_eq!(digests(&read_commands(version)), came_to);
    check_events(version, &world.store);
}

/// The state of the version before, raised: what it came to, and its last event.
fn check_raised(version: &str, store: &Store) {
    let events = events(store);
    let lines: Vec<_> = events.lines().collect();
    let raise = lines[lines.len() - 3..].join("\n");
    compare(version, "raised.txt", &format!("{} {}\n{raise}\n", store.digest(), store.views_digest()));
    store.verify().unwrap();
    assert!(raise.starts_with("cluster_version_raised"), "{raise}");
}

#[test]
fn i01_what_version_2_writes_stays_as_it_is() {
    let mut world = World::at(ClusterVersion::TWO);
    scenario_v2(&mut world);
    check_version("v2", &world, COMMANDS_V2.iter(), EVENTS_V1.iter());
}

#[test]
fn i01_i13_a_state_of_version_1_is_raised_to_version_2() {
    let raised = raised(&read_commands("v1"));
    check_raised("v2", &raised);
    assert_eq!(raised.log_time_ms(), 5_000);
    assert!(kept_outcomes(&raised) > 1);
}
