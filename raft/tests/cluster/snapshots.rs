//! Snapshots on their way to members that are behind.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use holdfast_model::Proposal;
use holdfast_raft::{Compaction, Consensus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::group::Group;

/// Writers that write as fast as they are answered, until they are stopped.
struct Load {
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
}

impl Load {
    const WRITERS: usize = 16;

    fn start(group: &Group, at: &Consensus, most: usize) -> Self {
        let proposals: Vec<Proposal> =
            (0..most).map(|number| group.write(&format!("load-{number}"))).collect();
        let proposals = Arc::new(Mutex::new(proposals));
        let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let writers = (0..Self::WRITERS).map(|_| {
            let (at, proposals) = (at.clone(), proposals.clone());
            let (written, stop) = (written.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let next = proposals.lock().unwrap().pop();
                    let Some(proposal) = next else { return };
                    at.propose(proposal).await.unwrap().unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        let writers = writers.collect();
        Load { written, stop, writers }
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Waits until so many writes were answered since the start.
    async fn reaches(&self, group: &Group, count: u64) {
        group.until("the writes", || (self.written() >= count).then_some(())).await;
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
    }
}

/// Never makes a snapshot by itself: one that it has was sent to it.
const MAKES_NONE: Compaction =
    Compaction { snapshot_entries: 1_000_000, kept_entries: 50_000, purge_entries: 1024 };

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_follower_far_behind_catches_up_by_a_snapshot_while_writes_go_on() {
    let mut group = Group::new();
    group.compaction = Compaction { snapshot_entries: 300, kept_entries: 50, purge_entries: 1 };
    group.grow(3).await;
    let (leader, victim) = (group.leader().await, group.follower().await);
    let end_of_victim = group.members[&victim].status().last_log.unwrap();
    group.stop(victim).await;
    let load = Load::start(&group, &group.members[&leader].clone(), 60_000);
    group
        .until("the log to be purged", || {
            group.members[&leader].status().purged.filter(|purged| *purged > end_of_victim)
        })
        .await;
    let before = load.written();
    group.compaction = MAKES_NONE;
    group.start(victim).await;
    group.until("the snapshot to arrive", || group.members[&victim].status().snapshot).await;
    // It has what was acknowledged by now, and the writes did not wait for it.
    group.members[&victim].linearize().await.unwrap();
    let during = load.written() - before;
    assert!(during > 0, "no write was answered while the follower caught up");
    load.reaches(&group, before + during + 200).await;
    load.end().await;
    group.same_everywhere().await;
}

/// Passes connections on to `to`, and breaks each one after so many bytes.
async fn breaking_proxy(to: SocketAddr, bytes: usize) -> SocketAddr {
    let listener = TcpListener::bind(SocketAddr::from((to.ip(), 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(to).await else { continue };
            tokio::spawn(async move {
                let (mut near_read, mut near_write) = near.into_split();
                let (mut far_read, mut far_write) = far.into_split();
                let back = tokio::spawn(async move { tokio::io::copy(&mut far_read, &mut near_write).await });
                let (mut buffer, mut left) = (vec![0; 16 * 1024], bytes);
                while left > 0 {
                    let Ok(count) = near_read.read(&mut buffer).await else { break };
                    if count == 0 || far_write.write_all(&buffer[..count]).await.is_err() {
                        break;
                    }
                    left = left.saturating_sub(count);
                }
                back.abort();
            });
        }
    });
    address
}

/// No connection lives for as long as the snapshot needs, and the receiver is restarted in the middle: it arrives only if
/// every attempt goes on where the one before stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_snapshot_arrives_over_connections_that_break_and_a_restart() {
    const BREAK_AFTER: usize = 700 * 1024;
    let mut group = Group::new();
    group.grow(1).await;
    let load = Load::start(&group, &group.members[&1].clone(), 6_000);
    load.reaches(&group, 6_000).await;
    load.end().await;
    group.members[&1].snapshot().await.unwrap();
    let snapshots = group.path(1).join("snapshots");
    let size = group.until("the snapshot", || finished(&snapshots)).await;
    assert!(size > 3 * BREAK_AFTER as u64, "the snapshot has only {size} bytes");
    // The leader purges its log, so that a new member needs the snapshot.
    group.stop(1).await;
    group.compaction = Compaction { snapshot_entries: 50, kept_entries: 5, purge_entries: 1 };
    group.start(1).await;
    for number in 0..60 {
        group.propose(1, group.write(&format!("more-{number}"))).await;
    }
    group.until("the log to be purged", || group.members[&1].status().purged).await;

    group.compaction = MAKES_NONE;
    group.prepare(2);
    group.start(2).await;
    let proxy = breaking_proxy(group.members[&2].raft_addr(), BREAK_AFTER).await;
    let mut node = group.node(2);
    node.raft_addr = proxy.to_string();
    let leader = group.members[&1].clone();
    let adding = tokio::spawn(async move { leader.add_learner(holdfast_model::MemberId(2), node).await });
    let receiving = group.path(2).join("snapshots");
    group.until("a part to arrive", || part(&receiving).filter(|bytes| *bytes > 0)).await;
    group.stop(2).await;
    assert!(part(&receiving).is_some(), "nothing of it was kept");
    group.start(2).await;
    group.until("the rest to arrive", || group.members[&2].status().snapshot).await;
    adding.await.unwrap().unwrap();
    group.same_everywhere().await;
}

/// Passes connections on to `to`, and no more than `bytes` over all of them until the gate is opened. Counts what it passed.
async fn gated_proxy(to: SocketAddr, bytes: u64, gate: Arc<AtomicBool>) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind(SocketAddr::from((to.ip(), 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    let passed = Arc::new(AtomicU64::new(0));
    let counted = passed.clone();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(to).await else { continue };
            let (gate, passed) = (gate.clone(), counted.clone());
            tokio::spawn(async move {
                let (mut near_read, mut near_write) = near.into_split();
                let (mut far_read, mut far_write) = far.into_split();
                let back = tokio::spawn(async move { tokio::io::copy(&mut far_read, &mut near_write).await });
                let mut buffer = vec![0; 16 * 1024];
                while let Ok(count) = near_read.read(&mut buffer).await {
                    while passed.load(Ordering::SeqCst) > bytes && !gate.load(Ordering::SeqCst) {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    passed.fetch_add(count as u64, Ordering::SeqCst);
                    if count == 0 || far_write.write_all(&buffer[..count]).await.is_err() {
                        break;
                    }
                }
                back.abort();
            });
        }
    });
    (address, passed)
}

/// The sender dies in the middle of the transfer. It, or whoever leads then, sends the same snapshot on from where it
/// stopped, or a newer one from the beginning; what comes out is the state.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_snapshot_arrives_although_its_sender_restarts_in_the_middle() {
    const STOP_AFTER: u64 = 700 * 1024;
    for newer in [false, true] {
        let mut group = Group::new();
        group.grow(1).await;
        let load = Load::start(&group, &group.members[&1].clone(), 4_000);
        load.reaches(&group, 4_000).await;
        load.end().await;
        group.members[&1].snapshot().await.unwrap();
        let snapshots = group.path(1).join("snapshots");
        let size = group.until("the snapshot", || finished(&snapshots)).await;
        assert!(size > 2 * STOP_AFTER, "the snapshot has only {size} bytes");
        // The leader purges its log, so that a new member needs the snapshot.
        group.stop(1).await;
        group.compaction = Compaction { snapshot_entries: 50, kept_entries: 5, purge_entries: 1 };
        group.start(1).await;
        for number in 0..60 {
            group.propose(1, group.write(&format!("more-{number}"))).await;
        }
        group.until("the log to be purged", || group.members[&1].status().purged).await;

        group.compaction = MAKES_NONE;
        group.prepare(2);
        group.start(2).await;
        let gate = Arc::new(AtomicBool::new(false));
        let (proxy, passed) = gated_proxy(group.members[&2].raft_addr(), STOP_AFTER, gate.clone()).await;
        let mut node = group.node(2);
        node.raft_addr = proxy.to_string();
        let (leader, second) = (group.members[&1].clone(), node.clone());
        let adding =
            tokio::spawn(async move { leader.add_learner(holdfast_model::MemberId(2), second).await });
        let receiving = group.path(2).join("snapshots");
        let part_of = |digest: Option<String>| part_named(&receiving, digest.as_deref());
        let begun = group.until("a part to arrive", || part_of(None).filter(|(_, bytes)| *bytes > 0)).await;
        group
            .until("the gate to be reached", || (passed.load(Ordering::SeqCst) > STOP_AFTER).then_some(()))
            .await;

        group.stop(1).await;
        adding.abort();
        assert!(group.members[&2].status().snapshot.is_none(), "all of it had arrived already");
        if newer {
            // What is sent after the restart is another snapshot.
            group.compaction = Compaction { snapshot_entries: 20, kept_entries: 5, purge_entries: 1 };
        }
        group.start(1).await;
        for number in 0..if newer { 60 } else { 0 } {
            group.propose(1, group.write(&format!("after-{number}"))).await;
        }
        let before = passed.swap(0, Ordering::SeqCst);
        gate.store(true, Ordering::SeqCst);
        group.members[&1].add_learner(holdfast_model::MemberId(2), node).await.unwrap();
        group.until("the rest to arrive", || group.members[&2].status().snapshot).await;
        if !newer {
            let sent = passed.load(Ordering::SeqCst);
            assert!(sent < size, "{sent} bytes of {size} were sent after the restart, and {before} before");
        }
        assert!(part_of(Some(begun.0)).is_none(), "what was received of the first one is still there");
        group.same_everywhere().await;
    }
}

/// Name and length of the snapshot that is being received, or of one with a certain name.
fn part_named(folder: &std::path::Path, name: Option<&str>) -> Option<(String, u64)> {
    let found = std::fs::read_dir(folder).ok()?.flatten();
    let mut parts = found.filter_map(|entry| {
        let own = entry.file_name().to_string_lossy().into_owned();
        let wanted = name.map_or(own.ends_with(".part"), |name| own == name);
        wanted.then_some((own, entry.metadata().ok()?.len()))
    });
    parts.next()
}

fn finished(folder: &std::path::Path) -> Option<u64> {
    with_suffix(folder, ".snapshot")
}

fn part(folder: &std::path::Path) -> Option<u64> {
    with_suffix(folder, ".part")
}

fn with_suffix(folder: &std::path::Path, suffix: &str) -> Option<u64> {
    let mut found = std::fs::read_dir(folder).ok()?.flatten();
    let file = found.find(|entry| entry.file_name().to_string_lossy().ends_with(suffix))?;
    Some(file.metadata().ok()?.len())
}

/// What is kept is kept for someone: a follower whose end lies within it is sent entries and no snapshot, at the boundary
/// too, and one entry further it is sent a snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_follower_within_what_is_kept_is_sent_entries() {
    const KEPT: u64 = 60;
    for within in [true, false] {
        let mut group = Group::new();
        group.compaction = Compaction { snapshot_entries: 30, kept_entries: KEPT, purge_entries: 1 };
        group.grow(3).await;
        let (leader, victim) = (group.leader().await, group.follower().await);
        group.stop(victim).await;
        let end_of_victim = group.members[&leader].status().last_log.unwrap();
        let mut number = 0;
        loop {
            let status = group.members[&leader].status();
            let purged = status.purged.unwrap_or(0);
            let last = status.last_log.unwrap();
            assert!(purged == 0 || last - purged >= KEPT, "{purged} was purged and the log ends at {last}");
            let reached = if within { last >= end_of_victim + KEPT - 1 } else { purged > end_of_victim };
            if reached {
                assert!(!within || purged <= end_of_victim, "the follower was cut off within what is kept");
                break;
            }
            group.propose(leader, group.write(&format!("org-{number}"))).await;
            number += 1;
        }
        group.compaction = MAKES_NONE;
        group.start(victim).await;
        group.members[&victim].linearize().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let sent = group.members[&victim].status().snapshot;
        assert_eq!(sent.is_none(), within, "within what is kept: {within}, a snapshot was sent: {sent:?}");
        group.same_everywhere().await;
    }
}
