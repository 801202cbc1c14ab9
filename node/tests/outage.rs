//! A node with real guests and no control plane at all: what crashes is started again, and what runs is adopted.
//!
//! Needs what `cargo xtask assets` makes and installs, and root. Each test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of single machines")]
mod guest_image;
mod namespace;
#[allow(dead_code, reason = "shared with the tests of crashes")]
mod scene;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use holdfast_client::{Link, View};
use holdfast_model::Revision;
use holdfast_model::agent::{LogLine, LogStream};
use holdfast_model::manifest::{Health, RestartPolicy};
use holdfast_model::resource::{InstanceReason, InstanceState};
use holdfast_node::agent::{AgentError, Node, wipe};
use holdfast_node::status::NodeStatus;
use holdfast_node::step::Step;
use scene::{Point, Scene, fetch, host_config, kill, runs, runtime, stamp, until, view, was_agent};
use tokio::sync::{oneshot, watch};

#[test]
fn i05_node_restarts_crashed_vm_without_servers() {
    const TEST: &str = "i05_node_restarts_crashed_vm_without_servers";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let [one, two] = [scene.instance(1), scene.instance(2)];
    scene.desire(&[one.clone(), two.clone()]);
    let mut agent = scene.agent();
    let first = agent.wait_for(one.id, InstanceState::Ready);
    let neighbour = agent.wait_for(two.id, InstanceState::Ready);
    assert!(fetch(one.address).unwrap().contains("page of 1"));
    assert!(fetch(two.address).unwrap().contains("page of 2"));

    kill(first.pid.unwrap());
    until("the crash is noticed", || view(&scene.data_dir(), one.id).is_some_and(|seen| seen.restarts == 1));
    let second = agent.wait_for(one.id, InstanceState::Ready);
    assert_eq!(second.restarts, 1);
    assert_ne!(second.pid, first.pid);
    assert!(fetch(one.address).unwrap().contains("page of 1"));
    assert_eq!(agent.wait_for(two.id, InstanceState::Ready), neighbour, "the neighbour was left alone");
    let refused = runtime().block_on(wipe(&scene.data_dir()));
    assert!(matches!(refused, Err(AgentError::InUse { .. })), "{refused:?}");
    agent.stop();

    let texts: Vec<_> = scene.log(one.id).into_iter().map(|line| (line.stream, line.text)).collect();
    let served = (LogStream::Stdout, "serving 1".to_owned());
    assert_eq!(texts.iter().filter(|line| **line == served).count(), 2, "{texts:?}");
    assert!(texts.contains(&(LogStream::System, "started again (1)".to_owned())), "{texts:?}");

    assert_eq!(scene.wipe(), 2);
    assert_eq!((scene.taps(), scene.folders(), scene.vmms()), (Vec::new(), 0, Vec::new()));
}

#[test]
fn i07_restarted_agent_adopts_running_vms() {
    const TEST: &str = "i07_restarted_agent_adopts_running_vms";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let [one, two] = [scene.instance(1), scene.instance(2)];
    scene.desire(&[one.clone(), two.clone()]);
    let mut agent = scene.agent();
    let before = [&one, &two].map(|instance| agent.wait_for(instance.id, InstanceState::Ready));
    agent.kill();
    assert!(fetch(one.address).unwrap().contains("page of 1"), "it serves without an agent");

    let mut agent = scene.agent();
    let after = [&one, &two].map(|instance| agent.wait_for(instance.id, InstanceState::Ready));
    assert_eq!(after, before, "adopted: same processes, no restarts");
    agent.stop();
    assert!(before.iter().all(|seen| runs(seen.pid.unwrap())), "an agent that is told to end leaves them");

    // I5: one that ended meanwhile is started again by the next agent, from its own disk.
    kill(before[0].pid.unwrap());
    let mut agent = scene.agent();
    until("the end is noticed", || view(&scene.data_dir(), one.id).is_some_and(|seen| seen.restarts == 1));
    agent.wait_for(one.id, InstanceState::Ready);
    assert!(fetch(one.address).unwrap().contains("page of 1"));
    assert_eq!(agent.wait_for(two.id, InstanceState::Ready), before[1]);
    agent.stop();

    // What is no longer desired goes, whole, and nothing else does.
    scene.desire(std::slice::from_ref(&two));
    let mut agent = scene.agent();
    until("the removed instance is gone", || scene.folders() == 1 && scene.taps().len() == 1);
    assert_eq!(agent.wait_for(two.id, InstanceState::Ready), before[1]);
    assert_eq!(scene.vmms(), [before[1].pid.unwrap()]);
    agent.stop();
    assert_eq!(scene.wipe(), 1);
}

#[test]
fn i05_a_host_that_was_restarted_comes_back_from_its_own_disk() {
    const TEST: &str = "i05_a_host_that_was_restarted_comes_back_from_its_own_disk";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let [mut one, mut two] = [scene.instance(1), scene.instance(2)];
    // No end would be forgiven, were it theirs.
    one.restart.max_retries = 0;
    two.restart.max_retries = 0;
    scene.desire(&[one.clone(), two.clone()]);
    let mut agent = scene.agent();
    let before = [&one, &two].map(|instance| agent.wait_for(instance.id, InstanceState::Ready));
    agent.kill();

    // What a restart of the host leaves: the disk, and another boot.
    before.iter().for_each(|seen| kill(seen.pid.unwrap()));
    scene.taps().iter().for_each(|tap| namespace::run("ip", &["link", "delete", "dev", tap]));
    let boot_id = scene.data_dir().join("boot_id");
    std::fs::write(&boot_id, "00000000-0000-4000-8000-000000000000\n").unwrap();
    namespace::run("mount", &["--bind", boot_id.to_str().unwrap(), "/proc/sys/kernel/random/boot_id"]);

    let mut agent = scene.agent();
    for instance in [&one, &two] {
        agent.wait_for(instance.id, InstanceState::Ready);
        assert!(fetch(instance.address).unwrap().contains("page of"));
    }
    assert_eq!(scene.vmms().len(), 2);
    agent.stop();
    assert_eq!(scene.wipe(), 2);
}

#[test]
fn i05_an_unknown_desired_set_is_not_an_empty_one() {
    const TEST: &str = "i05_an_unknown_desired_set_is_not_an_empty_one";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let one = scene.instance(1);
    scene.desire(std::slice::from_ref(&one));
    let mut agent = scene.agent();
    let before = agent.wait_for(one.id, InstanceState::Ready);
    agent.kill();

    // The replica and the node's own records are lost: nothing says that the machine should run, or should not.
    for file in ["replica.redb", "node.redb"] {
        std::fs::remove_file(scene.data_dir().join(file)).unwrap();
    }
    let data_dir = scene.data_dir();
    runtime().block_on(async {
        let node = Node::open(&host_config(&data_dir)).unwrap();
        let desired = watch::Sender::new(None);
        let link = watch::Sender::new(Link::Down { reason: "there is no control plane".to_owned() });
        let (shutdown, down) = oneshot::channel::<()>();
        let kept = tokio::spawn(node.keep(desired.subscribe(), link.subscribe(), None, async {
            down.await.ok();
        }));
        let waited = tokio::task::spawn_blocking(move || {
            until("the machine is adopted", || {
                view(&data_dir, one.id).is_some_and(|seen| seen.pid == before.pid)
            });
            assert!(fetch(one.address).unwrap().contains("page of 1"));
            // What is desired becomes known again, while this agent runs.
            let items = Arc::new(BTreeMap::from([(one.id, Arc::new(one.clone()))]));
            desired.send_replace(Some(Arc::new(View { stamp: stamp(2), items, held: None })));
            until("it is recognised", || view(&data_dir, one.id) == Some(before));
        });
        waited.await.unwrap();
        shutdown.send(()).unwrap();
        kept.await.unwrap().unwrap();
        // Another agent can take over at once, in the same process too: nothing holds the folder any more.
        Node::open(&host_config(&scene.data_dir())).unwrap();
    });
    assert_eq!(scene.wipe(), 1);
}

#[test]
fn what_cannot_run_fails_with_its_reason_and_leaves_only_its_log() {
    const TEST: &str = "what_cannot_run_fails_with_its_reason_and_leaves_only_its_log";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let script = |text: &str| Some(["sh", "-c", text].map(str::to_owned).to_vec());
    let [mut crashing, mut deaf, mut done] = [scene.instance(1), scene.instance(2), scene.instance(3)];
    crashing.command = script("echo about to fail >&2; exit 3");
    crashing.restart.max_retries = 1;
    deaf.command = script("sleep 1000");
    deaf.restart.max_retries = 0;
    deaf.health = deaf.health.map(|health| Health { grace_ms: 0, interval_ms: 100, ..health });
    done.command = script("echo done");
    done.restart.policy = RestartPolicy::OnFailure;
    scene.desire(&[crashing.clone(), deaf.clone(), done.clone()]);
    let mut agent = scene.agent();
    let crashed = agent.wait_for(crashing.id, InstanceState::Failed);
    assert_eq!((crashed.reason, crashed.restarts), (Some(InstanceReason::CrashLoopBackoff), 1));
    let failed = agent.wait_for(deaf.id, InstanceState::Failed);
    assert_eq!((failed.reason, failed.restarts), (Some(InstanceReason::HealthcheckFailed), 0));
    let stopped = agent.wait_for(done.id, InstanceState::Stopped);
    assert_eq!((stopped.reason, stopped.restarts), (None, 0));
    assert_eq!((scene.vmms(), scene.taps(), scene.folders()), (Vec::new(), Vec::new(), 0));
    agent.stop();
    let lines = scene.log(crashing.id);
    let said = |line: &LogLine| line.stream == LogStream::Stderr && line.text == "about to fail";
    assert_eq!(lines.iter().filter(|line| said(line)).count(), 2, "{lines:?}");

    // Final is final: the next agent starts none of them.
    let mut agent = scene.agent();
    assert_eq!(agent.wait_for(crashing.id, InstanceState::Failed), crashed);
    assert!(scene.vmms().is_empty());
    agent.stop();
}

#[test]
fn i11_a_node_that_was_quarantined_cuts_its_instances_off_for_good_and_keeps_them() {
    const TEST: &str = "i11_a_node_that_was_quarantined_cuts_its_instances_off_for_good_and_keeps_them";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let [one, two, three] = [scene.instance(1), scene.instance(2), scene.instance(3)];
    scene.desire(&[one.clone(), two.clone()]);
    let mut agent = scene.agent();
    let before = [&one, &two].map(|instance| agent.wait_for(instance.id, InstanceState::Ready));
    assert!(fetch(one.address).is_ok());
    agent.kill();

    let isolated = |scene: &Scene| {
        let told = NodeStatus::read(&scene.data_dir()).is_ok_and(|status| status.quarantined);
        told && scene.taps().iter().all(|tap| is_down(tap)) && scene.taps().len() == 2
    };
    // It is told while it works on something new, and dies as soon as it has obeyed.
    scene.desire(&[one.clone(), two.clone(), three.clone()]);
    let isolation = Point { step: Step::Isolated, nth: 1 };
    let mut agent = scene.agent_that_is_cut_off(Some(isolation));
    assert!(agent.ended_or(|| false));
    drop(agent);
    assert!(scene.taps().iter().all(|tap| is_down(tap)));
    assert!(fetch(one.address).is_err() && fetch(two.address).is_err());

    // Nobody tells the next one, and it finds what it must not do on its own disk. What ends is not started again, what is
    // new is not begun, what is withdrawn is not removed, and a TAP that somebody takes up goes down again.
    kill(before[0].pid.unwrap());
    scene.desire(std::slice::from_ref(&three));
    namespace::run("ip", &["link", "set", "dev", &scene.taps()[0], "up"]);
    let agent = scene.agent();
    until("the next agent isolates", || isolated(&scene));
    until("the end is noticed", || view(&scene.data_dir(), one.id).is_some_and(|seen| seen.pid.is_none()));
    std::thread::sleep(Duration::from_secs(2));
    assert!(isolated(&scene));
    assert_eq!((scene.vmms(), scene.folders()), (vec![before[1].pid.unwrap()], 2));
    assert_eq!(view(&scene.data_dir(), three.id), None);
    agent.stop();
    assert!(scene.log(one.id).iter().any(|line| line.text == "serving 1"), "its log is kept");
    // Who has looked into it wipes it.
    assert_eq!(scene.wipe(), 1);
    assert_eq!((scene.taps(), scene.folders()), (Vec::new(), 0));
}

/// Whether nothing passes a TAP.
fn is_down(tap: &str) -> bool {
    let output =
        std::process::Command::new("ip").args(["-oneline", "link", "show", "dev", tap]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let flags = text.split(['<', '>']).nth(1).unwrap();
    !flags.split(',').any(|flag| flag == "UP")
}

#[test]
fn what_a_node_has_no_room_for_is_refused_with_its_reason() {
    const TEST: &str = "what_a_node_has_no_room_for_is_refused_with_its_reason";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let (one, mut giant) = (scene.instance(1), scene.instance(2));
    giant.resources.memory_mib = 1 << 30;
    scene.desire(&[one.clone(), giant.clone()]);
    let mut agent = scene.agent();
    let refused = agent.wait_for(giant.id, InstanceState::Failed);
    assert_eq!((refused.reason, refused.restarts), (Some(InstanceReason::NoCapacity), 0));
    agent.wait_for(one.id, InstanceState::Ready);
    assert_eq!(
        (scene.vmms().len(), scene.taps().len(), scene.folders()),
        (1, 1, 1),
        "nothing of it was begun"
    );
    let status = NodeStatus::read(&scene.data_dir()).unwrap();
    let told = status.instances.iter().find(|seen| seen.observation.instance == giant.id).unwrap();
    let detail = told.observation.detail.as_deref().unwrap();
    assert!(detail.contains("needs 1073741888 MiB of memory"), "{detail}");
    agent.stop();
    assert_eq!(scene.wipe(), 1);
}

#[test]
fn what_is_withdrawn_while_it_starts_leaves_nothing() {
    const TEST: &str = "what_is_withdrawn_while_it_starts_leaves_nothing";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let scene = Scene::new(TEST);
    let data_dir = scene.data_dir();
    let one = scene.instance(1);
    let view = |revision, items: BTreeMap<_, _>| {
        Some(Arc::new(View { stamp: stamp(revision), items: Arc::new(items), held: None }))
    };
    runtime().block_on(async {
        let node = Node::open(&host_config(&data_dir)).unwrap();
        let desired = watch::Sender::new(view(1, BTreeMap::new()));
        let link = watch::Sender::new(Link::Down { reason: "there is no control plane".to_owned() });
        let (shutdown, down) = oneshot::channel::<()>();
        let kept = tokio::spawn(node.keep(desired.subscribe(), link.subscribe(), None, async {
            down.await.ok();
        }));
        // Wherever the start is by then: nothing of it may be left in the end.
        for (round, pause_ms) in [0, 5, 15, 30, 60, 120, 300, 900].into_iter().enumerate() {
            let revision = 2 * round as u64 + 2;
            desired.send_replace(view(revision, BTreeMap::from([(one.id, Arc::new(one.clone()))])));
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            desired.send_replace(view(revision + 1, BTreeMap::new()));
            let told = || NodeStatus::read(&data_dir).ok().filter(|s| s.instances.is_empty())?.revision;
            tokio::task::block_in_place(|| {
                until("nothing is known of it", || told() == Some(Revision(revision + 1)));
                assert_eq!((scene.vmms(), scene.taps(), scene.folders()), (Vec::new(), Vec::new(), 0));
            });
        }
        shutdown.send(()).unwrap();
        kept.await.unwrap().unwrap();
    });
}
