//! Which backend gets a new connection: of two drawn at random, the one with fewer connections.
//!
//! Drawn from the best group that has anyone left: in rotation and not draining; draining; out of rotation, because
//! trying a backend that was down a moment ago is better than closing the client without having tried.

use crate::backend::{Backend, Load};
use crate::table::Target;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Draws backends, from one seed per process.
#[derive(Debug)]
pub struct Balancer {
    seed: u64,
    draws: AtomicU64,
}

impl Balancer {
    /// A balancer that draws from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, draws: AtomicU64::new(0) }
    }

    /// Chooses among `targets`, without those in `tried`, and counts the connection as the chosen one's load.
    pub fn choose(&self, targets: &[Target], tried: &[Arc<Backend>]) -> Option<Load> {
        let untried = |t: &&Target| !tried.iter().any(|backend| Arc::ptr_eq(backend, &t.backend));
        let groups: [fn(&Target) -> bool; 3] = [
            |t| t.backend.in_rotation() && !t.draining,
            |t| t.backend.in_rotation() && t.draining,
            |t| !t.backend.in_rotation(),
        ];
        groups.into_iter().find_map(|group| self.of_two(targets.iter().filter(untried).filter(|t| group(t))))
    }

    fn of_two<'a>(&self, candidates: impl Iterator<Item = &'a Target> + Clone) -> Option<Load> {
        let count = candidates.clone().count();
        let nth = |index| candidates.clone().nth(index).map(|target| &target.backend);
        let chosen = match count {
            0 => None,
            1 => nth(0),
            _ => {
                let mut rng = SmallRng::seed_from_u64(self.seed ^ self.draws.fetch_add(1, Ordering::Relaxed));
                let first = rng.random_range(0..count);
                let second = (first + rng.random_range(1..count)) % count;
                [nth(first), nth(second)].into_iter().flatten().min_by_key(|backend| backend.connections())
            }
        };
        chosen.map(Load::on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendKey;

    fn targets(count: u16) -> Vec<Target> {
        (0..count)
            .map(|port| {
                let model = crate::testing::backend(port);
                let key = BackendKey { instance: model.instance, address: (model.address, port).into() };
                Target { backend: Arc::new(Backend::new(key)), draining: false }
            })
            .collect()
    }

    #[test]
    fn connections_spread_by_least_load_of_two() {
        let seed = rand::random();
        println!("seed {seed}");
        let (balancer, targets) = (Balancer::new(seed), targets(5));
        let loads: Vec<Load> = (0..500).map(|_| balancer.choose(&targets, &[]).unwrap()).collect();
        for target in &targets {
            // With two choices the fullest exceeds the mean by less than a handful; without, by tens.
            assert!((90..=110).contains(&target.backend.connections()), "{}", target.backend.connections());
        }
        drop(loads);
        assert!(targets.iter().all(|t| t.backend.connections() == 0));
    }

    #[test]
    fn draining_then_broken_backends_come_last_and_none_twice() {
        let (balancer, mut targets) = (Balancer::new(7), targets(3));
        targets[0].draining = true;
        targets[1].backend.leave_rotation();
        let mut tried = Vec::new();
        for want in [2, 0, 1] {
            let load = balancer.choose(&targets, &tried).unwrap();
            assert_eq!(load.backend().key().address.port(), want);
            tried.push(Arc::clone(&targets[usize::from(want)].backend));
        }
        assert!(balancer.choose(&targets, &tried).is_none());
    }
}
