//! Whether a member's disk still holds what it acknowledged (I2).
//!
//! Members remember, in memory, what others acknowledged to them. A member that starts asks for it before it takes part:
//! when it acknowledged more than its log has, its disk is older than itself, as after a restored image, and it could
//! vote or count for entries that it lost. It then refuses to start, for good. A leader that sees a log go back while it
//! leads keeps that away from openraft, which takes it for a defect of its own and may panic, and tells the member.
//!
//! What is not found: a log that went back while every member that remembered it was restarted or no longer leads.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use futures::future::join_all;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use serde::{Deserialize, Serialize};

use crate::health::Fault;
use crate::known_peers::KnownPeers;
use crate::network::Channels;
use crate::service::MemberRaft;
use crate::transport::message::{Purpose, Request, Response};
use crate::types::{LogId, Vote};

/// How long a member that starts waits for what the others remember. One that cannot be reached now says nothing.
const ASK_DEADLINE: Duration = Duration::from_millis(1_500);

/// What a leader remembers of a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Remembered {
    /// The leader's term and id: the follower had it stored as its vote when it acknowledged.
    pub(crate) leader: (u64, u64),
    /// Entries below this index were acknowledged to that leader.
    pub(crate) next: u64,
}

/// Whether a log and vote cannot be those that acknowledged this.
pub(crate) fn went_back(vote: Option<&Vote>, next: u64, remembered: Remembered) -> bool {
    #[cfg(feature = "planted-bugs")]
    if crate::planted::any() {
        return false;
    }
    let own = vote.map_or((0, 0), leader_of);
    // Under a later leader entries that were acknowledged to an earlier one may rightly be cut off.
    own < remembered.leader || (own == remembered.leader && next < remembered.next)
}

fn leader_of(vote: &Vote) -> (u64, u64) {
    (vote.leader_id.term, vote.leader_id.node_id)
}

/// What this member, if it leads, remembers of a follower.
pub(crate) fn of(raft: &MemberRaft, follower: u64) -> Option<Remembered> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    if metrics.state != ServerState::Leader {
        return None;
    }
    let matched = metrics.replication.as_ref()?.get(&follower)?.as_ref()?;
    Some(Remembered { leader: leader_of(&metrics.vote), next: matched.index() + 1 })
}

/// Asks every peer that this member knew what it remembers of it.
pub(crate) async fn ask(
    channels: &Channels,
    peers: &KnownPeers,
    vote: Option<Vote>,
    next: u64,
) -> Option<Fault> {
    let asked = peers.iter().map(|(other, address)| {
        let channel = channels.to(*other, address, Purpose::Control);
        async move {
            match channel.call(Request::Remembered, ASK_DEADLINE).await {
                Ok(Response::Remembered(remembered)) => remembered,
                _ => None,
            }
        }
    });
    let remembered = join_all(asked).await.into_iter().flatten();
    let lost =
        remembered.filter(|remembered| went_back(vote.as_ref(), next, *remembered)).max_by_key(|r| r.next);
    lost.map(|lost| Fault::WentBack {
        acknowledged: lost.next.saturating_sub(1),
        has: next.saturating_sub(1),
    })
}

/// What each member acknowledged to this one, for as long as it leads.
#[derive(Debug, Default)]
pub(crate) struct Acknowledged {
    by_member: Mutex<BTreeMap<u64, Remembered>>,
}

impl Acknowledged {
    /// A member acknowledged everything up to `matched` to the leader with this vote.
    pub(crate) fn note(&self, member: u64, vote: &Vote, matched: &LogId) {
        let (leader, next) = (leader_of(vote), matched.index() + 1);
        let Ok(mut by_member) = self.by_member.lock() else { return };
        let known = by_member.entry(member).or_insert(Remembered { leader, next });
        if known.leader != leader {
            *known = Remembered { leader, next };
        }
        known.next = known.next.max(next);
    }

    /// What is contradicted when a member says that it does not have the entry at `index`.
    pub(crate) fn contradicted(&self, member: u64, vote: &Vote, index: u64) -> Option<Remembered> {
        #[cfg(feature = "planted-bugs")]
        if crate::planted::any() {
            return None;
        }
        let by_member = self.by_member.lock().ok()?;
        by_member.get(&member).copied().filter(|known| known.leader == leader_of(vote) && index < known.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaderId;

    fn vote(term: u64, node: u64) -> Vote {
        Vote::new_committed(term, node)
    }

    #[test]
    fn i02_a_log_or_vote_behind_what_was_acknowledged_went_back() {
        let remembered = Remembered { leader: (3, 1), next: 10 };
        assert!(!went_back(Some(&vote(3, 1)), 10, remembered));
        assert!(!went_back(Some(&vote(3, 1)), 12, remembered));
        assert!(went_back(Some(&vote(3, 1)), 9, remembered), "the log lost an entry");
        assert!(went_back(Some(&vote(2, 9)), 50, remembered), "the vote was forgotten");
        assert!(went_back(None, 0, remembered), "everything was forgotten");
        assert!(!went_back(Some(&vote(4, 2)), 5, remembered), "a later leader may cut the log");
    }

    #[test]
    fn i02_a_leader_notices_that_a_log_goes_back_under_it_and_only_then() {
        let acknowledged = Acknowledged::default();
        let at = |index| LogId::new(LeaderId { term: 3, node_id: 1 }, index);
        acknowledged.note(2, &vote(3, 1), &at(9));
        acknowledged.note(2, &vote(3, 1), &at(4));
        assert!(acknowledged.contradicted(2, &vote(3, 1), 9).is_some());
        assert!(acknowledged.contradicted(2, &vote(3, 1), 10).is_none());
        assert!(acknowledged.contradicted(3, &vote(3, 1), 0).is_none());
        assert!(acknowledged.contradicted(2, &vote(5, 1), 4).is_none(), "another term");
    }
}
