//! Clocks that run at their own speed: each host has one for both of its clocks, and it keeps it for the whole run.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Parts of which a speed counts how many it is too fast.
const MILLION: i64 = 1_000_000;
/// How wrong a clock may be in most of the seeds that have wrong ones, in parts of a million.
const USUAL_PPM_MAX: i64 = 50_000;
/// The same in a few.
const EXTREME_PPM_MAX: i64 = 200_000;
/// Gives this its own random numbers, so that seeds without it stay what they were.
const SALT: u64 = 0x6472_6966_7400_0001;

/// How fast a host's clocks run: so many millionths faster than the world's, or slower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Speed {
    ppm: i64,
}

impl Speed {
    /// That of a clock that is right.
    pub(crate) const RIGHT: Speed = Speed { ppm: 0 };

    /// Whether it is wrong.
    pub(crate) fn drifts(self) -> bool {
        self.ppm != 0
    }

    /// What the host's clock has come to when the world's has come to `now_ms`. A millisecond has a million nanoseconds,
    /// so this is exact.
    pub(crate) fn local(self, now_ms: u64) -> Duration {
        Duration::from_nanos(now_ms.saturating_mul(MILLION.saturating_add(self.ppm).unsigned_abs()))
    }

    /// How long the world waits, at most a millisecond too long, while the host waits `wait_ms` by its own clock.
    pub(crate) fn world_wait_ms(self, wait_ms: u64) -> u64 {
        let wait_ns = wait_ms.saturating_mul(MILLION.unsigned_abs());
        wait_ns.div_ceil(MILLION.saturating_add(self.ppm).unsigned_abs())
    }
}

/// The speeds of the hosts of a seed: all right in half of the seeds.
pub(crate) fn draw(seed: u64, hosts: usize) -> Vec<Speed> {
    let mut rng = StdRng::seed_from_u64(seed ^ SALT);
    let most = match rng.random_range(0..20) {
        0..10 => 0,
        10..17 => USUAL_PPM_MAX,
        _ => EXTREME_PPM_MAX,
    };
    (0..hosts).map(|_| Speed { ppm: rng.random_range(-most..=most) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_over_when_the_hosts_own_clock_says_so_and_not_a_millisecond_of_the_world_before() {
        for ppm in [-EXTREME_PPM_MAX, -1, 0, 1, 49_999, EXTREME_PPM_MAX] {
            let speed = Speed { ppm };
            for (now_ms, wait_ms) in [(0, 1), (7, 3), (123_456, 1), (20_000, 999), (20_000, 60_000)] {
                let (waited_ms, wait) = (speed.world_wait_ms(wait_ms), Duration::from_millis(wait_ms));
                let passed = |until_ms| speed.local(until_ms).saturating_sub(speed.local(now_ms));
                assert!(passed(now_ms + waited_ms) >= wait, "{speed:?} woke early");
                assert!(passed(now_ms + waited_ms - 1) < wait, "{speed:?} woke late");
            }
        }
        assert_eq!(Speed::default().local(5), Duration::from_millis(5));
    }
}
