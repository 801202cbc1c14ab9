//! Which requests of one append stream wait for their answers.
//!
//! openraft takes an answer for that of every request that ends at or before the entry it names, and believes that the
//! follower was there when the latest of them was sent. A request without entries, sent only to say what is committed,
//! ends where the one before it ended: a late answer to the first would count as fresh, and a deposed leader could serve
//! a read on the strength of it (I3). So an answer is passed on only when no later request ends at or before its entry;
//! the answer to the last of them says the same, and comes next. Found by the simulation, seed 5077.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use openraft::entry::RaftEntry;
use openraft::raft::AppendEntriesRequest;

use crate::types::{LogId, TypeConfig};

/// Where requests end, from the oldest to the newest; as many as a stream has in flight. Clones are the same list.
#[derive(Clone, Default)]
pub(crate) struct Unanswered(Arc<Mutex<VecDeque<Option<LogId>>>>);

impl Unanswered {
    /// A request was taken from openraft, which has just noted the time.
    pub(crate) fn asked(&self, request: &AppendEntriesRequest<TypeConfig>) {
        let last = request.entries.last().map(|entry| entry.log_id()).or(request.prev_log_id);
        self.ends().push_back(last);
    }

    /// The oldest request was answered: everything up to `matched` is there. Whether openraft may be told.
    pub(crate) fn answered(&self, matched: &Option<LogId>) -> bool {
        let mut ends = self.ends();
        ends.pop_front();
        ends.front().is_none_or(|next| next > matched)
    }

    fn ends(&self) -> std::sync::MutexGuard<'_, VecDeque<Option<LogId>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LeaderId, Vote};

    fn at(index: u64) -> Option<LogId> {
        Some(LogId::new(LeaderId { term: 1, node_id: 1 }, index))
    }

    #[test]
    fn i03_an_answer_never_stands_for_a_later_request() {
        let unanswered = Unanswered::default();
        // Three that end at one entry, as when commits are told, and one after it.
        for prev in [7, 7, 7, 8] {
            let prev_log_id = at(prev);
            let vote = Vote::new(1, 1);
            unanswered.asked(&AppendEntriesRequest {
                vote,
                prev_log_id,
                entries: vec![],
                leader_commit: None,
            });
        }
        let told: Vec<bool> = [7, 7, 7, 8].iter().map(|index| unanswered.answered(&at(*index))).collect();
        assert_eq!(told, [false, false, true, true]);
    }
}
