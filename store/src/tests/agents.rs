//! What nodes report, what is heard of them, and what agents are told.

use super::world::*;
use crate::decide::{Refusal, decide};
use crate::head::Head;
use crate::overlay::{Draft, Filing};
use crate::{Views, agents};
use holdfast_model::agent::Desired;
use holdfast_model::command::AgentRef;
use holdfast_model::limits::RESCHEDULE_MS;
use holdfast_model::resource::{Capacity, InstanceReason, InstanceState, NodeState};
use holdfast_model::*;
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn i09_a_node_speaks_only_of_its_own_and_what_ended_stays_ended() {
    let mut world = World::new();
    let (n1, n2) = (world.node("n1", 4_096), world.node("n2", 4_096));
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    let instance = world.live(a.env).into_iter().find(|i| i.node == n1).unwrap();
    let digest = world.store.views_digest();
    let lie =
        Command::ReportInstances { node: n2, observations: vec![seen(instance.id, InstanceState::Failed)] };
    world.as_actor(Actor::Node(n2), None, lie.clone()).unwrap();
    assert_eq!(code(world.as_actor(Actor::Node(n1), None, lie)), Code::NotFound);
    let unknown = vec![seen(InstanceId::from_bits(3), InstanceState::Ready)];
    world
        .as_actor(Actor::Node(n1), None, Command::ReportInstances { node: n1, observations: unknown })
        .unwrap();
    assert_eq!(world.store.views_digest(), digest);
    // A node asks for nothing else.
    assert_eq!(
        code(world.as_actor(Actor::Node(n1), None, Command::DrainNode { node: n1 })),
        Code::Unauthenticated
    );

    world.report(&instance, InstanceState::Ready);
    world.report(&instance, InstanceState::Failed);
    let digest = world.store.views_digest();
    world.report(&instance, InstanceState::Ready);
    world.report(&instance, InstanceState::Draining);
    assert_eq!(world.store.views_digest(), digest);
    assert_eq!(world.view().instance(instance.id).unwrap().unwrap().state, InstanceState::Failed);
    world.check();
}

/// No command cuts a node off yet, so the event comes first here.
#[test]
fn i11_a_node_that_was_cut_off_is_not_heard() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let context = world.context(Actor::Node(node), None);
    let report = Command::ReportNode { node, capacity: Capacity::default(), vmm: "kvm".into() };
    let view = world.view();
    for state in [NodeState::Quarantined, NodeState::Disabled] {
        let mut draft = Draft::new(&view, Head::default(), &context);
        assert!(decide(&mut draft, &report).is_ok());
        let cut_off = EventPayload::NodeStateChanged { node, state, silent_since: None };
        draft.emit(Filing::cluster(Aggregate::Node(node)), cut_off).unwrap();
        let Err(Refusal::Rejected(rejection)) = decide(&mut draft, &report) else {
            panic!("a node that is {state:?} was heard")
        };
        assert_eq!(rejection.code, Code::Unauthenticated);
    }
}

#[test]
fn i14_a_long_detail_is_cut_and_a_long_report_refused() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    let instance = world.live(a.env)[0].clone();
    let mut observation = seen(instance.id, InstanceState::Ready);
    observation.detail = Some("é".repeat(10_000));
    let report = Command::ReportInstances { node, observations: vec![observation.clone()] };
    world.as_actor(Actor::Node(node), None, report).unwrap();
    let detail = world.view().instance(instance.id).unwrap().unwrap().detail.unwrap();
    assert_eq!(detail.len(), agent_detail_max());
    let many = vec![observation; holdfast_model::agent::REPORT_OBSERVATIONS_MAX + 1];
    let report = Command::ReportInstances { node, observations: many };
    assert_eq!(code(world.as_actor(Actor::Node(node), None, report)), Code::InvalidRequest);
}

fn agent_detail_max() -> usize {
    holdfast_model::agent::DETAIL_BYTES_MAX
}

#[test]
fn i07_a_silent_nodes_instances_move_late_and_its_return_restarts_nothing() {
    let mut world = World::new();
    let (n1, n2, _n3) = (world.node("n1", 4_096), world.node("n2", 4_096), world.node("n3", 4_096));
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    let before = world.live(a.env);
    let silent = |world: &World, node| Command::ReportSilence {
        silent: BTreeMap::from([(node, world.now)]),
        back: BTreeSet::new(),
    };
    let back = |node| Command::ReportSilence { silent: BTreeMap::new(), back: BTreeSet::from([node]) };
    let report = silent(&world, n1);
    world.system(report).unwrap();
    assert_eq!(world.view().node(n1).unwrap().unwrap().state, NodeState::Unreachable);
    world.tick_after(RESCHEDULE_MS - 1);
    assert_eq!(world.live(a.env), before);
    world.system(back(n1)).unwrap();
    assert_eq!(world.view().node(n1).unwrap().unwrap().state, NodeState::Active);
    world.tick_after(RESCHEDULE_MS);
    assert_eq!(world.live(a.env), before, "a return restarts nothing");

    let report = silent(&world, n2);
    world.system(report).unwrap();
    world.tick_after(RESCHEDULE_MS);
    let lost = before.iter().find(|i| i.node == n2).unwrap();
    let ended = world.view().instance(lost.id).unwrap().unwrap();
    assert_eq!((ended.state, ended.reason), (InstanceState::Failed, Some(InstanceReason::NodeLost)));
    let live = world.live(a.env);
    assert_eq!(live.len(), 3);
    assert!(live.iter().all(|i| i.node != n2));
    world.check();
}

#[test]
fn i07_when_most_nodes_are_silent_nothing_moves_for_long() {
    let mut world = World::new();
    let nodes = [world.node("n1", 4_096), world.node("n2", 4_096), world.node("n3", 4_096)];
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    let before = world.live(a.env);
    let silent = nodes[..2].iter().map(|n| (*n, world.now)).collect();
    world.system(Command::ReportSilence { silent, back: BTreeSet::new() }).unwrap();
    world.tick_after(10 * RESCHEDULE_MS);
    assert_eq!(world.live(a.env), before);
    world.tick_after(30 * RESCHEDULE_MS);
    assert!(world.live(a.env).iter().all(|i| i.node == nodes[2]));
}

#[test]
fn a_node_that_was_draining_is_still_draining_when_it_is_back() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    world.operator(Command::DrainNode { node }).unwrap();
    let silent = BTreeMap::from([(node, world.now)]);
    world.system(Command::ReportSilence { silent, back: BTreeSet::new() }).unwrap();
    world.system(Command::ReportSilence { silent: BTreeMap::new(), back: BTreeSet::from([node]) }).unwrap();
    let row = world.view().node(node).unwrap().unwrap();
    assert_eq!((row.state, row.silent_since), (NodeState::Draining, None));
    world.operator(Command::ActivateNode { node }).unwrap();
    assert_eq!(world.view().node(node).unwrap().unwrap().state, NodeState::Active);
}

#[test]
fn a_cordoned_node_keeps_what_it_has_and_takes_nothing() {
    let mut world = World::new();
    let nodes = ["n1", "n2"].map(|name| world.node(name, 4_096));
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(4) }).unwrap();
    world.settle(a.env);
    let on = |world: &World, node| world.live(a.env).iter().filter(|i| i.node == node).count();
    let before = world.live(a.env);
    world.operator(Command::CordonNode { node: nodes[0] }).unwrap();
    let revision = world.operator(Command::CordonNode { node: nodes[0] }).unwrap().revision;
    assert_eq!(world.operator(Command::CordonNode { node: nodes[0] }).unwrap().revision, revision);
    world.tick_after(2_000);
    assert_eq!(world.live(a.env), before, "nothing moves");
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(8) }).unwrap();
    world.settle(a.env);
    assert_eq!((on(&world, nodes[0]), on(&world, nodes[1])), (2, 6));
    // It is silent, and back, and still cordoned.
    let silent = BTreeMap::from([(nodes[0], world.now)]);
    world.system(Command::ReportSilence { silent, back: BTreeSet::new() }).unwrap();
    world
        .system(Command::ReportSilence { silent: BTreeMap::new(), back: BTreeSet::from([nodes[0]]) })
        .unwrap();
    let row = world.view().node(nodes[0]).unwrap().unwrap();
    assert_eq!((row.state, row.silent_since), (NodeState::Cordoned, None));
    world.operator(Command::ActivateNode { node: nodes[0] }).unwrap();
    assert_eq!(world.view().node(nodes[0]).unwrap().unwrap().state, NodeState::Active);
    world.operator(Command::DrainNode { node: nodes[0] }).unwrap();
    assert_eq!(code(world.operator(Command::CordonNode { node: nodes[0] })), Code::FailedPrecondition);
    let tenant = world.tenant_asks(&a, Command::CordonNode { node: nodes[1] });
    assert_eq!(code(tenant), Code::NotFound);
    world.check();
}

#[test]
fn i11_what_a_quarantined_node_has_fails_at_once_and_is_replaced_elsewhere() {
    let mut world = World::new();
    let nodes = ["n1", "n2"].map(|name| world.node(name, 4_096));
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(4) }).unwrap();
    world.settle(a.env);
    world.tenant_asks(&a, tcp_route(a.env, 5_432)).unwrap();
    let lost: Vec<_> = world.live(a.env).into_iter().filter(|i| i.node == nodes[0]).collect();
    assert_eq!(lost.len(), 2);
    assert_eq!(code(world.tenant_asks(&a, Command::QuarantineNode { node: nodes[0] })), Code::NotFound);
    world.operator(Command::QuarantineNode { node: nodes[0] }).unwrap();
    for instance in &lost {
        let now = world.view().instance(instance.id).unwrap().unwrap();
        assert_eq!((now.state, now.reason), (InstanceState::Failed, Some(InstanceReason::NodeQuarantined)));
    }
    // In the same step: no route leads to them, and others are placed where one may trust.
    let backends = &agents::edge_routes(&world.view()).unwrap()[0].backends;
    assert!(backends.iter().all(|b| lost.iter().all(|i| i.id != b.instance)) && backends.len() == 2);
    let live = world.live(a.env);
    assert!(live.len() == 4 && live.iter().all(|i| i.node == nodes[1]), "{live:?}");
    assert_eq!(agents::node_instances(&world.view(), nodes[0]).unwrap(), []);
    // Nothing that it says counts any more.
    let told = Command::ReportInstances { node: nodes[0], observations: Vec::new() };
    assert_eq!(code(world.as_actor(Actor::Node(nodes[0]), None, told)), Code::Unauthenticated);
    // A roll-out does not pay for it, and there is no way back.
    world.settle(a.env);
    let revision = world.store.revision();
    world.operator(Command::QuarantineNode { node: nodes[0] }).unwrap();
    assert_eq!(world.store.revision(), revision);
    for again in [Command::ActivateNode { node: nodes[0] }, Command::CordonNode { node: nodes[0] }] {
        assert_eq!(code(world.operator(again)), Code::FailedPrecondition);
    }
    world.check();
}

#[test]
fn i01_members_of_an_earlier_version_are_not_asked_to_cordon() {
    let mut world = World::at(ClusterVersion::TWO);
    let node = world.node("n1", 4_096);
    for command in [Command::CordonNode { node }, Command::QuarantineNode { node }] {
        assert_eq!(code(world.operator(command.clone())), Code::FailedPrecondition);
    }
    assert_eq!(world.view().node(node).unwrap().unwrap().state, NodeState::Active);
}

#[test]
fn removals_are_confirmed_only_up_to_what_has_happened() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let agent = AgentRef::Node(node);
    let through = world.store.revision();
    let early = Command::ConfirmRemovals { agent, through: through.next() };
    assert_eq!(code(world.operator(early)), Code::InvalidRequest);
    world.operator(Command::ConfirmRemovals { agent, through }).unwrap();
    assert_eq!(world.view().node(node).unwrap().unwrap().confirmed_through, through);
    let revision = world.store.revision();
    world.operator(Command::ConfirmRemovals { agent, through: Revision(1) }).unwrap();
    assert_eq!(world.store.revision(), revision);
}

#[test]
fn agents_get_what_is_theirs() {
    let mut world = World::new();
    let (n1, n2) = (world.node("n1", 4_096), world.node("n2", 4_096));
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.tenant_asks(&a, route(a.env, "a.example.com")).unwrap();
    assert_eq!(agents::edge_routes(&world.view()).unwrap()[0].backends, [], "nothing is ready");
    world.settle(a.env);
    let view = world.view();
    let routes = agents::edge_routes(&view).unwrap();
    assert_eq!(routes.len(), 1);
    assert_eq!(routes[0].backends.len(), 3);
    assert!(routes[0].backends.iter().all(|b| b.port == 8443 && !b.draining));
    assert!(routes[0].backends.is_sorted_by_key(|b| b.instance));
    let mut mine = agents::node_instances(&view, n1).unwrap();
    mine.extend(agents::node_instances(&view, n2).unwrap());
    assert_eq!(mine.len(), 3);
    assert!(mine.iter().all(|i| i.desired == Desired::Run && i.org.as_str() == "acme"));

    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(2) }).unwrap();
    let view = world.view();
    let routes = agents::edge_routes(&view).unwrap();
    assert_eq!(routes[0].backends.iter().filter(|b| b.draining).count(), 1);
    let drained = world.live(a.env).into_iter().find(|i| i.state == InstanceState::Draining).unwrap();
    let told = agents::node_instance(&view, drained.id).unwrap().unwrap();
    assert!(matches!(told.desired, Desired::Drain { .. }));
    world.report(&drained, InstanceState::Stopped);
    assert_eq!(agents::node_instance(&world.view(), drained.id).unwrap(), None);
}

#[test]
fn what_touches_an_agent_is_said_by_the_event() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    let quiet = world.store.revision();
    world.deploy(&a, release);
    world.settle(a.env);
    let view = world.view();
    let mut edges = 0;
    for event in view.events(quiet, 1_000, None).unwrap().events {
        let touched = agents::touches(&event, &view).unwrap();
        edges += usize::from(touched.edges);
        match event.payload {
            EventPayload::InstancePlaced(_) | EventPayload::InstanceStateChanged { .. } => {
                assert_eq!(touched.nodes, agents::TouchedNodes::One(node));
            }
            _ => assert_eq!(touched.nodes, agents::TouchedNodes::None),
        }
    }
    assert_eq!(edges, 3);
}
