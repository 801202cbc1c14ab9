//! Linearizable reads, in rounds: everyone who asks while a round is under way shares the next one.
//!
//! A reader may only use a round that began after it asked, or it could miss a write that was acknowledged in between
//! (I3). So the cost of a read index, one exchange with a majority, is paid per round and not per reader.

use std::future::Future;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use crate::error::ConsensusError;
use crate::types::LogId;

/// Readers that may wait for the next round.
const READERS_MAX: usize = 65_536;

/// Gathers readers into rounds.
#[derive(Default)]
pub(crate) struct ReadRounds {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: bool,
    waiting: Vec<oneshot::Sender<Result<LogId, ConsensusError>>>,
}

impl ReadRounds {
    /// Waits for a round that begins from now on, and returns what it found. `ask` runs one round; it is called on a
    /// task of its own, as often as there are readers that came too late for the round before.
    pub(crate) async fn join<A, F>(self: &Arc<Self>, ask: A) -> Result<LogId, ConsensusError>
    where
        A: Fn() -> F + Send + 'static,
        F: Future<Output = Result<LogId, ConsensusError>> + Send,
    {
        let (sender, answer) = oneshot::channel();
        let start = {
            let mut state = self.state.lock().map_err(|_| ConsensusError::ShuttingDown)?;
            if state.waiting.len() >= READERS_MAX {
                return Err(ConsensusError::Busy);
            }
            state.waiting.push(sender);
            !std::mem::replace(&mut state.running, true)
        };
        if start {
            let rounds = self.clone();
            tokio::spawn(async move {
                while let Some(readers) = rounds.next_readers() {
                    let result = ask().await;
                    for reader in readers {
                        // A reader that stopped waiting needs no answer.
                        drop(reader.send(result.clone()));
                    }
                }
            });
        }
        answer.await.map_err(|_| ConsensusError::ShuttingDown)?
    }

    /// Who shares the round that begins now. `None` ends the rounds until somebody asks again.
    fn next_readers(&self) -> Option<Vec<oneshot::Sender<Result<LogId, ConsensusError>>>> {
        let mut state = self.state.lock().ok()?;
        if state.waiting.is_empty() {
            state.running = false;
            return None;
        }
        Some(std::mem::take(&mut state.waiting))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Semaphore;

    use super::*;
    use crate::types::LeaderId;

    fn log_id(index: u64) -> LogId {
        LogId::new(LeaderId { term: 1, node_id: 1 }, index)
    }

    #[tokio::test]
    async fn i03_a_reader_never_shares_a_round_that_began_before_it_asked() {
        let rounds = Arc::new(ReadRounds::default());
        let (begun, gate) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
        let ask = {
            let (begun, gate) = (begun.clone(), gate.clone());
            move || {
                let (begun, gate) = (begun.clone(), gate.clone());
                async move {
                    let round = begun.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                    Ok(log_id(round))
                }
            }
        };
        let join = |rounds: &Arc<ReadRounds>| {
            let (rounds, ask) = (rounds.clone(), ask.clone());
            tokio::spawn(async move { rounds.join(ask).await })
        };
        let first = join(&rounds);
        while begun.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let late: Vec<_> = (0..100).map(|_| join(&rounds)).collect();
        while rounds.state.lock().unwrap().waiting.len() < 100 {
            tokio::task::yield_now().await;
        }
        gate.add_permits(2);
        assert_eq!(first.await.unwrap(), Ok(log_id(0)));
        for reader in late {
            assert_eq!(
                reader.await.unwrap(),
                Ok(log_id(1)),
                "late readers share the round after the one under way"
            );
        }
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
