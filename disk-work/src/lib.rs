//! Where work that waits for the disk runs: on threads of its own, or, in a simulation, in its place on the one thread
//! that there is.
//!
//! Every piece of such work in `raft` and in the following side of `client` goes through here, so that what is simulated is
//! the same code with the same order of steps for the same seed. Nothing here decides how long the product waits; only a simulation does.

use std::cell::RefCell;
use std::io;
use std::time::Duration;

/// How long the next piece of work takes in a simulation.
type Pace = Box<dyn Fn() -> Duration>;

thread_local! {
    static SIMULATED: RefCell<Option<Pace>> = const { RefCell::new(None) };
}

/// From now on work on the disk that is begun on this thread is done on this thread, between the steps of its tasks, and
/// takes as long as `pace` says of each piece. Members started here need no thread of their own. For simulations.
pub fn simulate_on_this_thread(pace: impl Fn() -> Duration + 'static) {
    SIMULATED.with(|simulated| *simulated.borrow_mut() = Some(Box::new(pace)));
}

/// How long the next piece of work takes, when this thread is a simulation.
pub fn simulated_pace() -> Option<Duration> {
    SIMULATED.with(|simulated| simulated.borrow().as_ref().map(|pace| pace()))
}

/// Does work that waits for the disk, off the runtime's threads. Outside a simulation work that was begun is done to its end,
/// also when nobody waits for it any more.
///
/// # Errors
/// When the work panicked, or the runtime was torn down before it began.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    match simulated_pace() {
        Some(pace) => {
            tokio::time::sleep(pace).await;
            Ok(work())
        }
        None => tokio::task::spawn_blocking(work).await.map_err(io::Error::other),
    }
}
