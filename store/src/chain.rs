//! Following the chain of events from outside of a state (I12).

use crate::error::StoreError;
use crate::event_bytes;
use holdfast_model::{Digest, Event, Revision};

/// Why an event does not continue the chain before it.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// Another event should have come.
    #[error("after revision {after} comes revision {found}: an event was removed, added or moved")]
    NotNext {
        /// The last event that was right.
        after: Revision,
        /// What came then.
        found: Revision,
    },
    /// Its digest does not follow from the chain and its own content.
    #[error("the event of revision {revision}, or one before it, was changed after it had been written")]
    Changed {
        /// Which.
        revision: Revision,
    },
    /// It has no stored form.
    #[error(
        "the event of revision {revision} cannot be brought into its stored form; use the release that exported it"
    )]
    Form {
        /// Which.
        revision: Revision,
        /// Why.
        source: StoreError,
    },
}

/// A place in the chain of events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The last event.
    pub revision: Revision,
    /// Its chain: all zeros before the first.
    pub digest: Digest,
}

impl Chain {
    /// Takes the next event in.
    ///
    /// # Errors
    /// When it is not the next one, or not what was written; the place stays as it was.
    pub fn follow(&mut self, event: &Event) -> Result<(), ChainError> {
        let revision = event.revision;
        if self.revision.0.checked_add(1) != Some(revision.0) {
            return Err(ChainError::NotNext { after: self.revision, found: revision });
        }
        let mut sealed = Event { chain: self.digest, ..event.clone() };
        event_bytes::seal(&mut sealed).map_err(|source| ChainError::Form { revision, source })?;
        if sealed.chain != event.chain {
            return Err(ChainError::Changed { revision });
        }
        *self = Self { revision, digest: event.chain };
        Ok(())
    }
}
