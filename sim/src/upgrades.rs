//! Rolling upgrades: all members begin as the build before, limited to the cluster version before the newest, and are
//! started again as the newest build while everything else goes wrong, too.
//!
//! The operator keeps the one rule that there is: nobody goes back once the last member is new, nor shortly before, while
//! a leader may still act on what it was told.

use holdfast_model::ClusterVersion;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// The version that the build before supports at most.
pub(crate) const PREVIOUS: ClusterVersion = ClusterVersion(ClusterVersion::NEWEST.0 - 1);

/// The share of seeds in which members are upgraded.
const SHARE: f64 = 0.3;
/// When the first goes, at most, and the pause after each, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 100..3_000;
/// How long after a member went back the next may be upgraded, in milliseconds: longer than a leader, whose clock may be
/// slow, takes to ask everybody.
const AFTER_GOING_BACK_MS: u64 = 4_000;
/// Gives this its own random numbers, so that seeds without it stay what they were.
const SALT: u64 = 0x7570_6772_6164_6501;

/// What is done to a host's build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Build {
    /// It becomes the newest.
    Newest,
    /// It becomes the one before again.
    Previous,
}

/// What is done when, in milliseconds since the first fault. Nothing when the seed has no upgrade.
pub(crate) type Upgrades = Vec<(u64, u64, Build)>;

/// Draws a seed's.
pub(crate) fn draw(seed: u64, hosts: usize) -> Upgrades {
    let mut rng = StdRng::seed_from_u64(seed ^ SALT);
    if !rng.random_bool(SHARE) {
        return Upgrades::new();
    }
    let mut order: Vec<u64> = (1..=hosts as u64).collect();
    order.shuffle(&mut rng);
    let mut at_ms = rng.random_range(PAUSE_MS);
    if rng.random_bool(0.2) {
        return order.into_iter().map(|host| (at_ms, host, Build::Newest)).collect();
    }
    // One that is not the last goes back, and is upgraded once more after the others.
    let goes_back = rng.random_bool(0.3).then(|| rng.random_range(0..hosts - 1));
    let mut upgrades = Upgrades::new();
    for (place, host) in order.iter().enumerate() {
        upgrades.push((at_ms, *host, Build::Newest));
        at_ms += rng.random_range(PAUSE_MS);
        if goes_back == Some(place) {
            upgrades.push((at_ms, *host, Build::Previous));
            at_ms += AFTER_GOING_BACK_MS;
        }
    }
    upgrades.extend(goes_back.map(|place| (at_ms, order[place], Build::Newest)));
    upgrades
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_ends_as_the_newest_build_and_nobody_goes_back_after_the_last_is_new() {
        let (mut with, mut back) = (0, 0);
        for seed in 0..400 {
            let hosts = if seed % 2 == 0 { 3 } else { 5 };
            let upgrades = draw(seed, hosts);
            if upgrades.is_empty() {
                continue;
            }
            with += 1;
            let mut newest = std::collections::BTreeSet::new();
            for (_, host, build) in &upgrades {
                match build {
                    Build::Newest => assert!(newest.insert(*host), "seed {seed}: {upgrades:?}"),
                    Build::Previous => {
                        assert!(newest.len() < hosts && newest.remove(host), "seed {seed}: {upgrades:?}");
                        back += 1;
                    }
                }
            }
            assert_eq!(newest.len(), hosts, "seed {seed}: {upgrades:?}");
            assert!(upgrades.is_sorted_by_key(|(at_ms, ..)| *at_ms));
        }
        assert!(with > 80 && back > 10, "{with} seeds with upgrades, {back} with one that goes back");
    }
}
