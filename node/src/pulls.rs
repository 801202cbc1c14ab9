//! Which instances wait for their images, and how far these are, for people. In memory only, and never in anybody's way:
//! who follows is woken when something else is being done about an image, not for each byte.

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_model::InstanceId;
use holdfast_model::agent::{ImagePhase, ImageProgress, Pull};
use tokio::sync::watch;

use crate::image::{Digest, Progress};

/// Nobody is at work on it yet.
const WAITING: ImageProgress =
    ImageProgress { phase: ImagePhase::Waiting, received_bytes: 0, total_bytes: 0, layer: 0, layers: 0 };

#[derive(Default)]
struct Table {
    /// Bounded by the instances that are here.
    waiting: BTreeMap<InstanceId, Digest>,
    /// Of images that somebody waits for.
    images: BTreeMap<Digest, ImageProgress>,
}

/// See the module. Cheap to share.
#[derive(Clone, Default)]
pub(crate) struct Pulls {
    table: Arc<watch::Sender<Table>>,
}

/// An instance waits for its image until this is dropped.
pub(crate) struct Wait {
    pulls: Pulls,
    instance: InstanceId,
    digest: Digest,
}

impl Pulls {
    /// An instance begins to wait for its image.
    pub(crate) fn wait(&self, instance: InstanceId, digest: Digest) -> Wait {
        self.table.send_modify(|table| {
            table.waiting.insert(instance, digest);
        });
        Wait { pulls: self.clone(), instance, digest }
    }

    /// Follows what is being done. Nobody is told of mere bytes.
    pub(crate) fn follow(&self) -> PullsFollower {
        PullsFollower { table: self.table.subscribe() }
    }
}

impl Wait {
    /// Work on the image has come this far, whoever else waits for it too.
    pub(crate) fn note(&self, progress: Progress) {
        self.pulls.table.send_if_modified(|table| {
            let image = table.images.entry(self.digest).or_insert(WAITING);
            let was = image.phase;
            advance(image, progress);
            image.phase != was
        });
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.pulls.table.send_modify(|table| {
            table.waiting.remove(&self.instance);
            if !table.waiting.values().any(|digest| *digest == self.digest) {
                table.images.remove(&self.digest);
            }
        });
    }
}

fn advance(image: &mut ImageProgress, progress: Progress) {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    match progress {
        Progress::Fetching { received_bytes, total_bytes, layers } => {
            *image = ImageProgress {
                phase: ImagePhase::Pulling,
                received_bytes,
                total_bytes,
                layer: 0,
                layers: number(layers),
            };
        }
        Progress::Unpacking { layer, layers } => {
            image.phase = ImagePhase::Unpacking;
            (image.layer, image.layers) = (number(layer), number(layers));
        }
        // When it is ready nobody waits for it any more.
        Progress::Building | Progress::Ready => image.phase = ImagePhase::Building,
    }
}

/// Sees how far images are.
pub(crate) struct PullsFollower {
    table: watch::Receiver<Table>,
}

impl PullsFollower {
    /// Waits until something else is being done about an image, or another instance waits.
    pub(crate) async fn changed(&mut self) {
        if self.table.changed().await.is_err() {
            // Nobody can wait any more.
            std::future::pending::<()>().await;
        }
    }

    /// Every instance that waits, and how far its image is.
    pub(crate) fn look(&mut self) -> BTreeMap<InstanceId, ImageProgress> {
        let table = self.table.borrow_and_update();
        let progress = |digest| table.images.get(digest).copied().unwrap_or(WAITING);
        table.waiting.iter().map(|(instance, digest)| (*instance, progress(digest))).collect()
    }
}

/// As they are reported: as many as a report holds.
pub(crate) fn reported(waiting: &BTreeMap<InstanceId, ImageProgress>) -> Vec<Pull> {
    let all = waiting.iter().map(|(instance, image)| Pull { instance: *instance, image: *image });
    all.take(holdfast_model::agent::REPORT_PULLS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use holdfast_model::agent::REPORT_PULLS_MAX;

    use super::*;

    fn fetching(received_bytes: u64) -> Progress {
        Progress::Fetching { received_bytes, total_bytes: 100, layers: 2 }
    }

    #[test]
    fn bytes_wake_nobody_and_are_seen_by_whoever_looks() {
        let (pulls, digest) = (Pulls::default(), Digest::of(b"image"));
        let mut follower = pulls.follow();
        let mut woken = || follower.changed().now_or_never().is_some();
        assert!(!woken());
        let [one, two] = [1, 2].map(InstanceId::from_bits);
        let first = pulls.wait(one, digest);
        assert!(woken());
        first.note(fetching(1));
        assert!(woken(), "it is being pulled now");
        for bytes in 2..100 {
            first.note(fetching(bytes));
            assert!(!woken());
        }
        let second = pulls.wait(two, digest);
        first.note(Progress::Unpacking { layer: 1, layers: 2 });
        assert!(woken());
        first.note(Progress::Unpacking { layer: 2, layers: 2 });
        assert!(!woken());
        let expected = ImageProgress {
            phase: ImagePhase::Unpacking,
            received_bytes: 99,
            total_bytes: 100,
            layer: 2,
            layers: 2,
        };
        let mut follower = pulls.follow();
        assert_eq!(
            follower.look(),
            BTreeMap::from([(one, expected), (two, expected)]),
            "it is the same image"
        );
        // Whoever was at work goes; the other one goes on from what there is.
        drop(first);
        assert_eq!(follower.look().keys().collect::<Vec<_>>(), [&two]);
        drop(second);
        assert!(follower.look().is_empty());
        let again = pulls.wait(one, digest);
        assert_eq!(follower.look()[&one], WAITING, "nothing of an earlier pull is told");
        drop(again);
    }

    #[test]
    fn no_more_are_reported_than_a_report_holds() {
        let pulls = Pulls::default();
        let digest = Digest::of(b"image");
        let waiting: Vec<_> =
            (0..REPORT_PULLS_MAX as u128 + 9).map(|n| pulls.wait(InstanceId::from_bits(n), digest)).collect();
        let seen = pulls.follow().look();
        assert_eq!((seen.len(), reported(&seen).len()), (waiting.len(), REPORT_PULLS_MAX));
    }
}
