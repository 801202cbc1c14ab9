//! Reporting: the newest report goes to any member, at once when it changes and at every heartbeat. A report that could
//! not be delivered is replaced by the next; there is no queue to fill up in an outage (I5).

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_model::VolumeId;
use holdfast_model::agent::{REPORT_PATH, Report};
use holdfast_model::api::Reported;
use holdfast_model::limits::HEARTBEAT_MS;
use holdfast_model::volume_snapshot::SnapshotWork;
use tokio::sync::watch;

use crate::follow::chain;
use crate::http::Client;

/// Shortest time between two reports, so that a flapping instance does not become a flood.
pub const REPORT_GAP_MIN: Duration = Duration::from_millis(100);
/// Longest that one delivery is tried before the newest report takes its place.
pub const DELIVERY_MAX: Duration = Duration::from_secs(5);

/// Where an agent puts its newest report. Clones share one slot.
#[derive(Debug, Clone)]
pub struct ReportSlot {
    newest: watch::Sender<Option<Report>>,
}

impl ReportSlot {
    /// Replaces the report. An equal one waits for the next heartbeat.
    pub fn put(&self, report: Report) {
        self.newest.send_if_modified(|newest| {
            let changed = newest.as_ref() != Some(&report);
            *newest = Some(report);
            changed
        });
    }
}

/// Delivers what is in a slot.
#[derive(Debug)]
pub struct Reporter {
    client: Client,
    newest: watch::Receiver<Option<Report>>,
    erase: watch::Sender<BTreeSet<VolumeId>>,
    snapshots: watch::Sender<Option<SnapshotWork>>,
}

/// A slot and what delivers from it; run the second ([`Reporter::run`]).
pub fn reporter(client: &Client) -> (ReportSlot, Reporter) {
    let newest = watch::Sender::new(None);
    let receiver = newest.subscribe();
    let erase = watch::Sender::new(BTreeSet::new());
    let snapshots = watch::Sender::new(None);
    let client = client.with_deadline(DELIVERY_MAX);
    (ReportSlot { newest }, Reporter { client, newest: receiver, erase, snapshots })
}

impl Reporter {
    /// Deleted volumes whose disks the node is to erase, as it was last told.
    pub fn erase(&self) -> watch::Receiver<BTreeSet<VolumeId>> {
        self.erase.subscribe()
    }

    /// What the node has to do about snapshots, as it was last told; `None` before the first answer.
    pub fn snapshots(&self) -> watch::Receiver<Option<SnapshotWork>> {
        self.snapshots.subscribe()
    }

    /// Delivers until `stop` becomes true, its sender is gone, or every slot is dropped.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let deliveries = async {
            let mut delivered = true;
            loop {
                let woken = tokio::time::timeout(beat(), self.newest.changed()).await;
                if let Ok(Err(_)) = woken {
                    return;
                }
                let Some(report) = self.newest.borrow_and_update().clone() else { continue };
                let outcome = self.client.post::<_, Reported>(REPORT_PATH, &report).await;
                if let Ok(reported) = &outcome {
                    tell(&self.erase, &reported.erase);
                    tell(&self.snapshots, &Some(reported.snapshots.clone()));
                }
                match &outcome {
                    Ok(_) if !delivered => tracing::info!("reports are delivered again"),
                    Err(error) if delivered => {
                        tracing::warn!(error = %chain(error), "a report could not be delivered; the newest will be");
                    }
                    _ => {}
                }
                delivered = outcome.is_ok();
                tokio::time::sleep(REPORT_GAP_MIN).await;
            }
        };
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            () = deliveries => {}
        }
    }
}

/// Tells what is new, and wakes nobody for what is not.
fn tell<T: Clone + PartialEq>(to: &watch::Sender<T>, told: &T) {
    to.send_if_modified(|known| {
        let changed = known != told;
        if changed {
            known.clone_from(told);
        }
        changed
    });
}

/// A heartbeat with jitter: between four fifths of the interval and all of it.
fn beat() -> Duration {
    Duration::from_millis(rand::random_range(HEARTBEAT_MS * 4 / 5..=HEARTBEAT_MS))
}
