//! How the network behaves at the moment: delays, losses, and who cannot reach whom.

use std::collections::BTreeSet;

use rand::RngExt;
use rand::rngs::StdRng;

/// Delays and losses on every path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// The shortest and the longest way of a frame, in milliseconds.
    pub(crate) latency_ms: (u64, u64),
    /// Of questions and answers, the share that is lost. Log streams lose nothing: TCP does not.
    pub(crate) lost: f64,
    /// The share that arrives twice.
    pub(crate) doubled: f64,
    /// By how much a question or answer may be late, and so overtaken, in milliseconds.
    pub(crate) reorder_ms: u64,
}

impl Weather {
    /// A quiet LAN.
    pub(crate) const CALM: Weather = Weather { latency_ms: (0, 2), lost: 0.0, doubled: 0.0, reorder_ms: 0 };

    /// Any weather.
    pub(crate) fn draw(rng: &mut StdRng) -> Self {
        let longest = rng.random_range(1..80);
        let share = |rng: &mut StdRng, most: f64| {
            if rng.random_bool(0.5) { rng.random_range(0.0..most) } else { 0.0 }
        };
        Weather {
            latency_ms: (rng.random_range(0..=longest), longest),
            lost: share(rng, 0.15),
            doubled: share(rng, 0.2),
            reorder_ms: rng.random_range(0..200),
        }
    }
}

/// One-way paths on which nothing arrives.
pub(crate) type Blocked = BTreeSet<(u64, u64)>;

/// A partition of the members, of any shape.
pub(crate) fn draw_partition(rng: &mut StdRng, members: &[u64], leader: Option<u64>) -> Blocked {
    let mut blocked = Blocked::new();
    let mut cut = |from: u64, to: u64| {
        blocked.insert((from, to));
    };
    let one = leader
        .filter(|_| rng.random_bool(0.6))
        .unwrap_or_else(|| members[rng.random_range(0..members.len())]);
    match rng.random_range(0..5) {
        // One member alone.
        0 => members.iter().filter(|m| **m != one).for_each(|m| {
            cut(one, *m);
            cut(*m, one);
        }),
        // One member hears nothing.
        1 => members.iter().filter(|m| **m != one).for_each(|m| cut(*m, one)),
        // One member is not heard.
        2 => members.iter().filter(|m| **m != one).for_each(|m| cut(one, *m)),
        // Two sides.
        3 => {
            let sides: Vec<bool> = members.iter().map(|_| rng.random_bool(0.5)).collect();
            for (a, a_side) in members.iter().zip(&sides) {
                for (b, b_side) in members.iter().zip(&sides) {
                    if a_side != b_side {
                        cut(*a, *b);
                    }
                }
            }
        }
        // Any set of one-way cuts: not everybody hears everybody.
        _ => {
            for a in members {
                for b in members {
                    if a != b && rng.random_bool(0.3) {
                        cut(*a, *b);
                    }
                }
            }
        }
    }
    blocked
}

/// Cuts agents off from members, each in its own way: not at all, from all of them, or from some, in either direction.
pub(crate) fn cut_agents(rng: &mut StdRng, blocked: &mut Blocked, agents: &[u64], members: &[u64]) {
    for agent in agents {
        let (to, from) = match rng.random_range(0..4) {
            0 => continue,
            1 => (1.0, 1.0),
            _ => (rng.random_range(0.0..1.0), rng.random_range(0.0..1.0)),
        };
        for member in members {
            if rng.random_bool(to) {
                blocked.insert((*agent, *member));
            }
            if rng.random_bool(from) {
                blocked.insert((*member, *agent));
            }
        }
    }
}
