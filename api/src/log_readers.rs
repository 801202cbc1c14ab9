//! How many read lines at a time: each reader holds a connection, a question at a node and a piece of a log in memory.

use crate::problem::Refusal;
use holdfast_model::{Code, OrgId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Streams of lines that one org may have at one member.
pub const LOG_STREAMS_ORG_MAX: usize = 64;
/// Streams of lines of all orgs at one member.
pub const LOG_STREAMS_MAX: usize = 1_024;

type Counts = Arc<Mutex<BTreeMap<OrgId, usize>>>;

/// The readers of this member.
#[derive(Debug, Default)]
pub struct LogReaders {
    counts: Counts,
}

/// The right to read until it is dropped.
#[derive(Debug)]
pub struct Reading {
    counts: Counts,
    org: OrgId,
}

impl LogReaders {
    /// How many there are, of all orgs.
    pub fn all(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    /// One more reader of an org's lines.
    ///
    /// # Errors
    /// When the org or the member has all that it may.
    pub fn begin(&self, org: OrgId) -> Result<Reading, Refusal> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (own, all) = (counts.get(&org).copied().unwrap_or(0), counts.values().sum::<usize>());
        if own >= LOG_STREAMS_ORG_MAX {
            let detail =
                format!("The org reads {own} logs at this member, and no more at a time; end one of them.");
            let refusal = Refusal::new(Code::QuotaExceeded, detail).with("dimension", "log_streams");
            return Err(refusal.with("limit", LOG_STREAMS_ORG_MAX).with("usage", own).with("asked", 1));
        }
        if all >= LOG_STREAMS_MAX {
            return Err(Refusal::new(Code::RateLimited, "Too many logs are read at this member; try again."));
        }
        *counts.entry(org).or_default() += 1;
        Ok(Reading { counts: Arc::clone(&self.counts), org })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.org) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.org);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_bounded_by_org_and_by_member_and_leave_room_when_they_end() {
        let readers = LogReaders::default();
        let org = |n: usize| OrgId::from_bits(n as u128);
        let mut held: Vec<Reading> =
            (0..LOG_STREAMS_ORG_MAX).map(|_| readers.begin(org(0)).unwrap()).collect();
        assert_eq!(readers.begin(org(0)).unwrap_err().code, Code::QuotaExceeded);
        held.pop();
        held.push(readers.begin(org(0)).unwrap());
        for n in LOG_STREAMS_ORG_MAX..LOG_STREAMS_MAX {
            held.push(readers.begin(org(n)).unwrap());
        }
        assert_eq!(readers.begin(org(1)).unwrap_err().code, Code::RateLimited);
        drop(held);
        assert!(readers.counts.lock().unwrap().is_empty());
    }
}
