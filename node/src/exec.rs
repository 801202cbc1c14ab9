//! Programs that people run beside workloads: which guests can be asked to, and the node's part of each session.
//!
//! The agent opens no port. The member that passes a session on asks over the stream that the agent dialled, and the
//! agent dials that member for the session's bytes. A program runs in the guest and never on the host. A session ends
//! when its time is over by this host's own clock, whatever anybody says, and with the agent: the guest hangs up what
//! an agent that is gone has started (I11).

mod session;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdfast_client::{Client, Endpoint};
use holdfast_model::InstanceId;
use holdfast_model::agent::CallAnswer;
use holdfast_model::exec::ExecCall;
use tokio::sync::Semaphore;

use crate::vmm::channel::GuestSender;
use session::Session;

/// The most sessions of this node at a time.
const SESSIONS_MAX: usize = 64;

/// The guests that can be asked, and the sessions under way.
#[derive(Debug)]
pub struct Execs {
    guests: Mutex<Guests>,
    sessions: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Guests {
    open: BTreeMap<InstanceId, (u64, GuestSender)>,
    /// Tells one channel of a guest from its next.
    generations: u64,
}

impl Default for Execs {
    fn default() -> Self {
        Self { guests: Mutex::default(), sessions: Arc::new(Semaphore::new(SESSIONS_MAX)) }
    }
}

/// As long as it is held, the guest can be asked.
#[derive(Debug)]
pub struct Opened {
    execs: Arc<Execs>,
    instance: InstanceId,
    generation: u64,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut guests = self.execs.lock();
        if guests.open.get(&self.instance).is_some_and(|(generation, _)| *generation == self.generation) {
            guests.open.remove(&self.instance);
        }
    }
}

impl Execs {
    fn lock(&self) -> MutexGuard<'_, Guests> {
        // Every change leaves the map whole.
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest can be asked over this channel from now on.
    pub fn open(self: &Arc<Self>, instance: InstanceId, sender: GuestSender) -> Opened {
        let mut guests = self.lock();
        guests.generations += 1;
        let generation = guests.generations;
        guests.open.insert(instance, (generation, sender));
        Opened { execs: Arc::clone(self), instance, generation }
    }

    /// Begins a session, which goes on by itself.
    pub fn answer(&self, client: &Client, call: ExecCall) -> CallAnswer {
        let refused = |reason: &str| CallAnswer::Refused { reason: reason.to_owned() };
        let guest = self.lock().open.get(&call.instance).map(|(_, sender)| sender.clone());
        let Some(guest) = guest else {
            return refused("The instance does not run on its node now; `holdfast instances` says why.");
        };
        let Ok(member) = call.member.parse::<Endpoint>() else {
            return refused("The node cannot dial the member that asked: its API address makes no sense.");
        };
        let Ok(permit) = Arc::clone(&self.sessions).try_acquire_owned() else {
            return refused("The node has as many exec sessions as it takes; try again later.");
        };
        let session = Session { client: client.clone(), member, guest, call };
        tokio::spawn(async move {
            session.run().await;
            drop(permit);
        });
        CallAnswer::ExecComes
    }
}
