//! Each family's rules, one at a time.

use super::world::*;
use crate::{ENV_ENDED_KEPT, Views, agents};
use holdfast_model::command::Joiner;
use holdfast_model::limits::IDEMPOTENCY_KEPT_MS;
use holdfast_model::resource::{Capacity, Enrolled, EnrolmentKind, RouteTarget, TokenKind};
use holdfast_model::*;
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn the_cluster_is_initialised_first_and_once() {
    let store = memory_store();
    let context = Context {
        actor: Actor::System(MemberId(1)),
        actor_org: None,
        source: None,
        request_id: RequestId::from_bits(1),
        idempotency_key: None,
        now: START,
        entropy: 1,
    };
    let early = Proposal { context, command: Command::Tick };
    let outcome = store.apply(LogIndex(5), &[vec![], vec![early]], b"").unwrap();
    assert_eq!(outcome[0], []);
    assert_eq!(code(outcome[1][0].clone()), Code::FailedPrecondition);

    let mut world = World::new();
    assert_eq!(code(world.system(init())), Code::AlreadyInitialised);
    let cluster = world.view().cluster().unwrap().unwrap();
    assert_eq!((cluster.members_enrolled, cluster.incarnation), (1, Incarnation(1)));
    assert_eq!(world.view().members().unwrap().len(), 1);
}

#[test]
fn names_are_unique_where_they_must_be() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    world.tenant("other", 11);
    assert_eq!(code(world.operator(Command::CreateOrg { name: "acme".parse().unwrap() })), Code::NameTaken);
    let app = Command::CreateApp { org: a.org, name: "hello".parse().unwrap() };
    assert_eq!(code(world.operator(app)), Code::NameTaken);
    let env = Command::CreateEnv { app: a.app, name: "prod".parse().unwrap() };
    assert_eq!(code(world.operator(env)), Code::NameTaken);
    let found = world.view().env_by_name(a.app, &"prod".parse().unwrap()).unwrap().unwrap();
    assert_eq!(found.id, a.env);
    world.check();
}

#[test]
fn lists_page_in_the_order_of_their_keys() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    for name in ["zeta", "alpha", "mid"] {
        world.operator(Command::CreateApp { org: a.org, name: name.parse().unwrap() }).unwrap();
    }
    let view = world.view();
    let names = |page: Vec<resource::App>| page.into_iter().map(|a| a.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(view.apps(a.org, None, 2).unwrap()), ["alpha", "hello"]);
    assert_eq!(names(view.apps(a.org, Some(&"hello".parse().unwrap()), 9).unwrap()), ["mid", "zeta"]);
}

#[test]
fn i09_what_lies_outside_the_org_answers_as_what_is_absent() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let (a, b) = (world.tenant("acme", 10), world.tenant("other", 11));
    let release = world.release(&b, 1);
    let Output::Route(theirs) = world.tenant_asks(&b, route(b.env, "b.example.com")).unwrap().output else {
        panic!("no route")
    };
    let web = || "web".parse().unwrap();
    type Ask = Box<dyn Fn(bool) -> Command>;
    // Each command twice: about the other org's thing, and about a thing that is not there.
    let pick = |there: bool, bits: u128| if there { bits } else { 0xdead };
    let asks: Vec<Ask> = vec![
        Box::new(move |x| Command::CreateApp {
            org: OrgId::from_bits(pick(x, b.org.bits())),
            name: "x".parse().unwrap(),
        }),
        Box::new(move |x| Command::CreateEnv {
            app: AppId::from_bits(pick(x, b.app.bits())),
            name: "x".parse().unwrap(),
        }),
        Box::new(move |x| Command::DeleteApp {
            app: AppId::from_bits(pick(x, b.app.bits())),
            expected_version: Some(99),
        }),
        Box::new(move |x| {
            Command::CreateToken(token(50, TokenKind::Org(OrgId::from_bits(pick(x, b.org.bits()))), &[]))
        }),
        Box::new(move |x| Command::RevokeToken { token: TokenId::from_bits(pick(x, b.token.bits())) }),
        Box::new(move |x| Command::CreateRelease {
            env: EnvId::from_bits(pick(x, b.env.bits())),
            image: image(1),
            manifest: manifest("hello", ""),
        }),
        Box::new(move |x| Command::Deploy {
            env: EnvId::from_bits(pick(x, b.env.bits())),
            release,
            counts: BTreeMap::new(),
        }),
        Box::new(move |x| Command::Deploy {
            env: a.env,
            release: ReleaseId::from_bits(pick(x, release.bits())),
            counts: BTreeMap::new(),
        }),
        Box::new(move |x| Command::Scale {
            env: EnvId::from_bits(pick(x, b.env.bits())),
            counts: BTreeMap::from([(web(), 1)]),
        }),
        Box::new(move |x| route(EnvId::from_bits(pick(x, b.env.bits())), "b.example.com")),
        Box::new(move |x| Command::DeleteRoute {
            route: RouteId::from_bits(pick(x, theirs.bits())),
            expected_version: Some(9),
        }),
        Box::new(move |x| Command::DrainNode { node: NodeId::from_bits(pick(x, node.bits())) }),
        Box::new(move |x| Command::ActivateNode { node: NodeId::from_bits(pick(x, node.bits())) }),
        Box::new(move |x| Command::CordonNode { node: NodeId::from_bits(pick(x, node.bits())) }),
        Box::new(move |x| Command::QuarantineNode { node: NodeId::from_bits(pick(x, node.bits())) }),
        Box::new(move |x| Command::ReportNode {
            node: NodeId::from_bits(pick(x, node.bits())),
            capacity: Capacity::default(),
            vmm: String::new(),
        }),
    ];
    for ask in asks {
        let there = world.tenant_asks(&a, ask(true)).unwrap_err();
        let absent = world.tenant_asks(&a, ask(false)).unwrap_err();
        assert_eq!(there.code, Code::NotFound, "{:?}", ask(true));
        assert_eq!(postcard::to_stdvec(&there).unwrap(), postcard::to_stdvec(&absent).unwrap());
    }
    assert_eq!(
        code(world.tenant_asks(&a, Command::CreateOrg { name: "mine".parse().unwrap() })),
        Code::NotFound
    );
    let operator = Command::CreateToken(token(51, TokenKind::Operator, &[]));
    assert_eq!(code(world.tenant_asks(&a, operator)), Code::NotFound);
    world.check();
}

#[test]
fn i11_a_revoked_or_expired_token_decides_nothing() {
    for version in [ClusterVersion::ONE, ClusterVersion::NEWEST] {
        retries_return_the_first_outcome(World::at(version));
    }
}

fn retries_return_the_first_outcome(mut world: World) {
    let a = world.tenant("acme", 10);
    let ask = |name: &str| Command::CreateApp { org: a.org, name: name.parse().unwrap() };
    world.tenant_asks(&a, ask("one")).unwrap();
    world.operator(Command::RevokeToken { token: a.token }).unwrap();
    let revoked_at = world.view().token(a.token).unwrap().unwrap().revoked_at;
    assert_eq!(revoked_at, Some(world.now));
    assert_eq!(code(world.tenant_asks(&a, ask("two"))), Code::Unauthenticated);
    // Revoking again changes nothing.
    let before = world.store.revision();
    world.operator(Command::RevokeToken { token: a.token }).unwrap();
    assert_eq!(world.store.revision(), before);

    let b = world.tenant("other", 11);
    world.now = world.now.plus_ms(limits::TOKEN_MS_MAX);
    let late = Command::CreateApp { org: b.org, name: "late".parse().unwrap() };
    assert_eq!(code(world.tenant_asks(&b, late)), Code::Unauthenticated);
    // A token that claims another org than its own is no credential at all.
    world.now = START;
    let c = world.tenant("third", 12);
    let crossed = Command::CreateApp { org: b.org, name: "x".parse().unwrap() };
    assert_eq!(code(world.as_actor(Actor::Token(c.token), Some(b.org), crossed)), Code::Unauthenticated);
    world.check();
}

#[test]
fn i09_a_tenants_token_hands_on_only_what_it_has() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    let fine = token(20, TokenKind::Org(a.org), &[Scope::AppsRead]);
    world.tenant_asks(&a, Command::CreateToken(fine.clone())).unwrap();
    let beyond = token(21, TokenKind::Org(a.org), &[Scope::ClusterAdmin]);
    assert_eq!(code(world.tenant_asks(&a, Command::CreateToken(beyond))), Code::Forbidden);
    assert_eq!(code(world.tenant_asks(&a, Command::CreateToken(fine))), Code::InvalidRequest);
    assert_eq!(world.view().tokens(Some(a.org), None, 10).unwrap().len(), 2);
    assert_eq!(world.view().tokens(None, None, 10).unwrap().len(), 1);
}

#[test]
fn i11_an_enrolment_lets_in_one_key_of_its_kind_in_its_time() {
    let mut world = World::new();
    let digest = Digest([5; 32]);
    let create = |ttl_ms| Command::CreateEnrolment { kind: EnrolmentKind::Edge, digest, ttl_ms };
    for ttl_ms in [0, limits::ENROLMENT_MS_MAX + 1] {
        assert_eq!(code(world.operator(create(ttl_ms))), Code::InvalidRequest);
    }
    let Output::Enrolment(id) = world.operator(create(1_000)).unwrap().output else { panic!("no enrolment") };
    let edge = |key: u8| Command::Enrol {
        digest,
        key: Digest([key; 32]),
        joiner: Joiner::Edge { name: "e1".parse().unwrap() },
    };
    let wrong = Command::Enrol {
        digest,
        key: Digest([1; 32]),
        joiner: Joiner::Node { name: "e1".parse().unwrap(), capacity: Capacity::default() },
    };
    let actor = Actor::Enrolling(id);
    assert_eq!(code(world.as_actor(actor, None, wrong)), Code::EnrolmentInvalid);
    let first = world.as_actor(actor, None, edge(1)).unwrap().output;
    assert!(matches!(first, Output::Enrolled(Enrolled::Edge(_))));
    world.now = world.now.plus_ms(2_000);
    // The same key asks again, for it may not have got the answer; another key is refused.
    assert_eq!(world.as_actor(actor, None, edge(1)).unwrap().output, first);
    assert_eq!(code(world.as_actor(actor, None, edge(2))), Code::EnrolmentInvalid);
    assert_eq!(world.view().edges().unwrap().len(), 1);

    let late = Digest([6; 32]);
    world
        .operator(Command::CreateEnrolment { kind: EnrolmentKind::Edge, digest: late, ttl_ms: 1_000 })
        .unwrap();
    world.now = world.now.plus_ms(1_000);
    let join = Command::Enrol {
        digest: late,
        key: Digest([1; 32]),
        joiner: Joiner::Edge { name: "e2".parse().unwrap() },
    };
    assert_eq!(code(world.as_actor(actor, None, join)), Code::EnrolmentInvalid);
    world.check();
}

#[test]
fn nodes_get_prefixes_that_do_not_overlap_and_instances_addresses_of_their_node() {
    let mut world = World::new();
    let (n1, n2) = (world.node("n1", 4_096), world.node("n2", 4_096));
    let view = world.view();
    let (p1, p2) = (view.node(n1).unwrap().unwrap().prefix, view.node(n2).unwrap().unwrap().prefix);
    assert_ne!(p1, p2);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    let live = world.live(a.env);
    let addresses: BTreeSet<_> = live.iter().map(|i| i.address).collect();
    assert_eq!(addresses.len(), 3);
    for instance in &live {
        assert!(world.view().node(instance.node).unwrap().unwrap().prefix.contains(instance.address));
    }
    assert_eq!(live.iter().map(|i| i.node).collect::<BTreeSet<_>>(), BTreeSet::from([n1, n2]), "spread");
}

#[test]
fn i08_a_hostname_has_one_owner_and_a_tcp_port_is_alone() {
    let mut world = World::new();
    let (a, b) = (world.tenant("acme", 10), world.tenant("other", 11));
    assert_eq!(code(world.tenant_asks(&a, route(a.env, "a.example.com"))), Code::FailedPrecondition);
    world.release(&a, 1);
    world.release(&b, 1);
    let Output::Route(id) = world.tenant_asks(&a, route(a.env, "a.example.com")).unwrap().output else {
        panic!("no route")
    };
    let taken = world.tenant_asks(&b, route(b.env, "a.example.com")).unwrap_err();
    assert_eq!(taken.code, Code::HostnameTaken);
    assert!(!taken.message.contains("acme") && !taken.message.contains(&a.org.to_string()), "{taken}");
    // The same name on another port is the same name.
    let Command::CreateRoute { target, process, port, proxy_protocol, .. } = route(b.env, "a.example.com")
    else {
        panic!("no route")
    };
    let elsewhere =
        Command::CreateRoute { env: b.env, target, listen_port: 8443, process, port, proxy_protocol };
    assert_eq!(code(world.tenant_asks(&b, elsewhere)), Code::HostnameTaken);

    world.tenant_asks(&b, route(b.env, "b.example.com")).unwrap();
    assert_eq!(code(world.tenant_asks(&b, tcp_route(b.env, 443))), Code::PortTaken);
    world.tenant_asks(&b, tcp_route(b.env, 5432)).unwrap();
    assert_eq!(code(world.tenant_asks(&a, tcp_route(a.env, 5432))), Code::PortTaken);
    for denied in [0, 22, 25, 445, limits::API_PORT, limits::RAFT_PORT] {
        assert_eq!(code(world.tenant_asks(&a, tcp_route(a.env, denied))), Code::InvalidRequest);
    }
    let conflict = Command::DeleteRoute { route: id, expected_version: Some(2) };
    assert_eq!(code(world.tenant_asks(&a, conflict)), Code::VersionConflict);
    world.tenant_asks(&a, Command::DeleteRoute { route: id, expected_version: Some(1) }).unwrap();
    world.tenant_asks(&b, route(b.env, "a.example.com")).unwrap();
    let owner = world.view().route_by_hostname(&"a.example.com".parse().unwrap()).unwrap().unwrap();
    assert_eq!(owner.org, b.org);
    world.check();
}

#[test]
fn a_route_leads_only_to_a_port_that_is_declared() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    world.release(&a, 1);
    for (process, port) in [("web", "http"), ("worker", "https")] {
        let command = Command::CreateRoute {
            env: a.env,
            target: RouteTarget::Tcp,
            listen_port: 8_000,
            process: process.parse().unwrap(),
            port: port.parse().unwrap(),
            proxy_protocol: Default::default(),
        };
        assert_eq!(code(world.tenant_asks(&a, command)), Code::FailedPrecondition);
    }
}

#[test]
fn i04_a_retry_returns_the_first_outcome_and_changes_nothing() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    let ask = |name: &str| Command::CreateApp { org: a.org, name: name.parse().unwrap() };
    let keyed = |world: &mut World| {
        let context = world.context(Actor::Token(a.token), Some(a.org));
        Context { idempotency_key: Some("key-1".into()), ..context }
    };
    let context = keyed(&mut world);
    let first = world.propose(context, ask("one"));
    let (revision, views) = (world.store.revision(), world.store.views_digest());
    assert!(first.is_ok());
    for _ in 0..2 {
        world.now = world.now.plus_ms(1_000);
        let context = keyed(&mut world);
        assert_eq!(world.propose(context, ask("one")), first);
    }
    let context = keyed(&mut world);
    assert_eq!(code(world.propose(context, ask("two"))), Code::IdempotencyKeyReuse);
    // The scope is (org, actor, operation): the key is free for another operation.
    let context = keyed(&mut world);
    let env = Command::CreateEnv { app: AppId::from_bits(1), name: "x".parse().unwrap() };
    assert_eq!(code(world.propose(context, env)), Code::NotFound);
    assert_eq!((world.store.revision(), world.store.views_digest()), (revision, views));

    // A rejection is an outcome like any other.
    let context = Context { idempotency_key: Some("key-2".into()), ..keyed(&mut world) };
    let rejected = world.propose(context, ask("hello"));
    assert_eq!(rejected.clone().unwrap_err().code, Code::NameTaken);
    world.tenant_asks(&a, Command::DeleteApp { app: a.app, expected_version: None }).unwrap();
    let context = Context { idempotency_key: Some("key-2".into()), ..keyed(&mut world) };
    assert_eq!(world.propose(context, ask("hello")), rejected);

    world.outlast(IDEMPOTENCY_KEPT_MS);
    let context = Context { idempotency_key: Some("key-2".into()), ..keyed(&mut world) };
    assert!(world.propose(context, ask("hello")).is_ok());
    world.check();
}

#[test]
fn i04_i09_a_key_is_its_holders_own() {
    let mut world = World::new();
    let (a, b) = (world.tenant("acme", 10), world.tenant("other", 11));
    let scopes: Vec<_> = Role::Owner.scopes().iter().collect();
    let more = Command::CreateToken(token(12, TokenKind::Org(a.org), &scopes));
    let Output::Token(colleague) = world.operator(more).unwrap().output else { panic!("no token") };
    let mut ask = |token: TokenId, org: OrgId, name: &str| {
        let context = world.context(Actor::Token(token), Some(org));
        let context = Context { idempotency_key: Some("key".into()), ..context };
        world.propose(context, Command::CreateApp { org: a.org, name: name.parse().unwrap() })
    };
    let first = ask(a.token, a.org, "one");
    assert!(first.is_ok());
    // The same words of another org are about what does not exist for it, whoever said them first.
    assert_eq!(code(ask(b.token, b.org, "one")), Code::NotFound);
    // And another token of the same org may have drawn the same key.
    assert!(ask(colleague, a.org, "two").is_ok());
    assert_eq!(ask(a.token, a.org, "one"), first);
    world.check();
}

#[test]
fn i04_at_version_1_an_outcome_is_kept_to_the_end_of_its_time() {
    for (key, kept_ms) in [(Some("key"), IDEMPOTENCY_KEPT_MS), (None, crate::REQUEST_KEPT_MS)] {
        let mut world = World::at(ClusterVersion::ONE);
        let context = world.context(Actor::Operator(world.operator), None);
        let context = Context { idempotency_key: key.map(Into::into), ..context };
        let command = Command::CreateOrg { name: "acme".parse().unwrap() };
        let first = world.propose(context.clone(), command.clone());
        // Others come in meanwhile, and with each of them outcomes that are over are removed.
        world.tick_after(kept_ms - 1);
        world.operator(Command::CreateOrg { name: "other".parse().unwrap() }).unwrap();
        let again = Context { now: world.now, ..context };
        assert_eq!(world.propose(again, command), first, "{key:?}");
    }
}

#[test]
fn i04_a_proposal_that_is_sent_twice_takes_effect_once() {
    let mut world = World::new();
    let context = world.context(Actor::Operator(world.operator), None);
    let command = Command::CreateOrg { name: "acme".parse().unwrap() };
    let first = world.propose(context.clone(), command.clone());
    let revision = world.store.revision();
    assert_eq!(world.propose(context.clone(), command), first);
    assert_eq!(world.store.revision(), revision);
    // Another command of the same request is another command.
    world.propose(context, Command::CreateOrg { name: "other".parse().unwrap() }).unwrap();
    world.check();
}

#[test]
fn outcomes_are_forgotten_in_time_and_a_few_at_a_time() {
    for version in [ClusterVersion::ONE, ClusterVersion::NEWEST] {
        outcomes_are_forgotten(World::at(version));
    }
}

fn outcomes_are_forgotten(mut world: World) {
    for n in 0..40 {
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
    }
    let held = |world: &World| kept_outcomes(&world.store);
    assert_eq!(held(&world), 41);
    world.outlast(crate::REQUEST_KEPT_MS);
    world.operator(Command::CreateOrg { name: "later".parse().unwrap() }).unwrap();
    assert_eq!(held(&world), 38);
    for _ in 0..20 {
        world.system(Command::Tick).unwrap();
    }
    assert_eq!(held(&world), 1);
}

#[test]
fn deleting_an_app_leaves_nothing_of_it_behind() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    world.tenant_asks(&a, route(a.env, "a.example.com")).unwrap();
    let conflict = Command::DeleteApp { app: a.app, expected_version: Some(7) };
    assert_eq!(code(world.tenant_asks(&a, conflict)), Code::VersionConflict);
    world.tenant_asks(&a, Command::DeleteApp { app: a.app, expected_version: Some(1) }).unwrap();
    let view = world.view();
    assert!(view.app(a.app).unwrap().is_none() && view.env(a.env).unwrap().is_none());
    assert!(view.release(release).unwrap().is_none());
    assert!(view.route_by_hostname(&"a.example.com".parse().unwrap()).unwrap().is_none());
    assert_eq!(agents::node_instances(&view, node).unwrap(), []);
    assert_eq!(agents::edge_routes(&view).unwrap(), []);
    assert_eq!(view.node_load(node).unwrap(), Default::default());
    world.check();
}

#[test]
fn an_env_keeps_the_last_few_ended_instances() {
    let mut world = World::new();
    world.node("n1", 40_960);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    for n in 0..10 {
        let count = if n % 2 == 0 { 1 } else { 10 };
        world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(count) }).unwrap();
        world.settle(a.env);
    }
    let view = world.view();
    assert_eq!(view.ended_instances(a.env).unwrap().len(), ENV_ENDED_KEPT);
    assert_eq!(view.instances(a.env).unwrap().len(), ENV_ENDED_KEPT + 10);
    world.check();
}

#[test]
fn manifests_must_fit_their_app() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    let create = |manifest| Command::CreateRelease { env: a.env, image: image(1), manifest };
    assert_eq!(code(world.tenant_asks(&a, create(manifest("other", "")))), Code::InvalidManifest);
    let release = world.release(&a, 1);
    let deploy = |counts| Command::Deploy { env: a.env, release, counts };
    assert_eq!(code(world.tenant_asks(&a, deploy(counts(51)))), Code::InvalidRequest);
    let unknown = BTreeMap::from([("worker".parse().unwrap(), 1)]);
    assert_eq!(code(world.tenant_asks(&a, deploy(unknown))), Code::InvalidRequest);
    assert_eq!(
        code(world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(1) })),
        Code::FailedPrecondition
    );
}
