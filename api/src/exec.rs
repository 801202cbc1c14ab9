//! Exec sessions, as a member passes them on between a person and a node.
//!
//! A person's stream ends at whichever member they dialled. That member uses the grant up, in log order, and asks the
//! node, through whichever member holds the node's follow stream, to dial it for this one session. So both streams end
//! here, no member relays for another, and what is under way is a few frames in each direction ([`mod@relay`]). What a
//! session says is looked at only to tell one kind of frame from another, and is kept nowhere (I10).

mod frames;
mod relay;
mod watch;

pub(crate) use frames::{FrameReader, FrameWriter};
pub(crate) use relay::{Session, relay};

use crate::caller::Caller;
use crate::problem::Refusal;
use holdfast_model::exec::{ExecInput, ExecOutput};
use holdfast_model::{Code, ExecGrantId, NodeId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// The most sessions that one member passes on.
pub const SESSIONS_MAX: usize = 256;

/// A node's part of a session, as it came.
pub(crate) struct NodePart {
    /// Hears the program.
    pub(crate) reader: FrameReader<ExecOutput>,
    /// Speaks to the program.
    pub(crate) writer: FrameWriter<ExecInput>,
    /// The node.
    pub(crate) caller: Caller,
}

/// What a grant waits for on this member.
enum Place {
    /// The node, to take its part.
    Expects { node: NodeId, part: oneshot::Sender<NodePart> },
    /// Nothing: both parts are here.
    Runs,
}

/// The sessions of this member.
#[derive(Default)]
pub struct Desk {
    places: Mutex<BTreeMap<ExecGrantId, Place>>,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ExecGrantId, Place>> {
        // Every change leaves the map whole.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a session whose node is to come.
    pub(crate) fn expect(
        self: &Arc<Self>,
        grant: ExecGrantId,
        node: NodeId,
    ) -> Result<(Seat, oneshot::Receiver<NodePart>), Refusal> {
        let mut places = self.lock();
        if places.contains_key(&grant) {
            let detail = "The exec grant was used already, and is good for one session: ask for another.";
            return Err(Refusal::new(Code::FailedPrecondition, detail));
        }
        if places.len() >= SESSIONS_MAX {
            let detail = "This member passes on as many exec sessions as it can; try again.";
            return Err(Refusal::new(Code::RateLimited, detail));
        }
        let (part, comes) = oneshot::channel();
        places.insert(grant, Place::Expects { node, part });
        Ok((Seat { desk: Arc::clone(self), grant }, comes))
    }

    /// A node takes its part; false when nobody waits for this node.
    pub(crate) fn arrived(&self, grant: ExecGrantId, node: NodeId, part: NodePart) -> bool {
        let mut places = self.lock();
        if !matches!(places.get(&grant), Some(Place::Expects { node: expected, .. }) if *expected == node) {
            return false;
        }
        match places.insert(grant, Place::Runs) {
            Some(Place::Expects { part: waits, .. }) => waits.send(part).is_ok(),
            _ => false,
        }
    }

    /// Whether a session of this grant is here.
    pub(crate) fn has(&self, grant: ExecGrantId) -> bool {
        self.lock().contains_key(&grant)
    }
}

/// A session's place, for as long as it is held.
pub(crate) struct Seat {
    desk: Arc<Desk>,
    grant: ExecGrantId,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.desk.lock().remove(&self.grant);
    }
}
