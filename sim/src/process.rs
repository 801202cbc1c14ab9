//! A process of a host: a runtime of its own that is only run when something in it can go on.
//!
//! Dropping it is its death, in the middle of whatever it does.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::task::AbortHandle;

use crate::drift::Speed;
use crate::machine::{self, Wait};

thread_local! {
    /// What the disk of the host that has the thread takes, in milliseconds: from, to.
    static DISK_MS: Cell<(u64, u64)> = const { Cell::new((0, 1)) };
}

/// Makes work on disks take what the current host's disk takes. Once per process.
pub(crate) fn pace_disks() {
    holdfast_raft::disk_work::simulate_on_this_thread(|| {
        use rand::RngExt;
        let (from, to) = DISK_MS.get();
        Duration::from_millis(rand::rng().random_range(from..=to))
    });
}

/// What a process finds when it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    /// By how much the host's wall clock is wrong.
    pub(crate) wall_offset_ms: i64,
    /// How fast its clocks run.
    pub(crate) speed: Speed,
    /// How long a piece of work on its disk takes, in milliseconds: from, to.
    pub(crate) disk_ms: (u64, u64),
}

impl Machine {
    /// A machine in good order.
    pub(crate) const WELL: Machine = Machine { wall_offset_ms: 0, speed: Speed::RIGHT, disk_ms: (0, 2) };

    /// This process of ours has the host's clocks from now on.
    pub(crate) fn take_clocks(&self, now_ms: u64) {
        machine::set_time(self.speed.local(now_ms), self.wall_offset_ms);
    }
}

/// A process.
pub(crate) struct Process {
    runtime: Runtime,
    idle: Arc<Idle>,
    /// When the next of its timers is due.
    wake_ms: Option<u64>,
}

impl Process {
    /// A process with nothing to do yet.
    pub(crate) fn new() -> Result<Self, String> {
        let idle = Arc::new(Idle::default());
        let slept = idle.clone();
        // With I/O, although there is none, because then it sleeps by `epoll_wait`: see `machine`.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_unpark(move || slept.note())
            .build()
            .map_err(|error| format!("a runtime could not be made: {error}"))?;
        Ok(Process { runtime, idle, wake_ms: Some(0) })
    }

    /// Adds a task.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.runtime.spawn(task).abort_handle()
    }

    /// Whether anything can run at this time: a timer is due, or something from outside woke a task.
    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        self.wake_ms.is_some_and(|due| due <= now_ms) || self.runtime.metrics().global_queue_depth() > 0
    }

    /// Runs everything that can run at this time.
    pub(crate) fn run(&mut self, now_ms: u64, machine: Machine) {
        machine.take_clocks(now_ms);
        DISK_MS.set(machine.disk_ms);
        let wait = self.runtime.block_on(UntilIdle { idle: &self.idle, stage: Stage::Timers });
        self.wake_ms = match wait {
            Wait::No => Some(now_ms),
            Wait::Ms(wait_ms) => Some(now_ms + machine.speed.world_wait_ms(wait_ms)),
            Wait::ForEver => None,
        };
    }
}

/// Notes that a runtime would sleep, and wakes whoever waits for that instead.
#[derive(Default)]
struct Idle {
    slept: Mutex<Option<Wait>>,
    waker: Mutex<Option<Waker>>,
}

impl Idle {
    fn note(&self) {
        // It looks without waiting when a timer is due at once; then its tasks go on.
        let wait = machine::last_wait();
        if wait == Wait::No {
            return;
        }
        *self.slept.lock().unwrap_or_else(PoisonError::into_inner) = Some(wait);
        if let Some(waker) = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take() {
            waker.wake();
        }
    }
}

/// Lets a runtime run its timers, then its tasks until none can go on. Answers for how long it would sleep then.
struct UntilIdle<'a> {
    idle: &'a Idle,
    stage: Stage,
}

enum Stage {
    /// Once round without waiting, so that timers that are due wake their tasks.
    Timers,
    /// The tasks run from now on.
    Tasks,
    /// They are running.
    Waiting,
}

impl Future for UntilIdle<'_> {
    type Output = Wait;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Wait> {
        let mut slept = self.idle.slept.lock().unwrap_or_else(PoisonError::into_inner);
        match self.stage {
            Stage::Timers => {
                drop(slept);
                self.stage = Stage::Tasks;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            Stage::Tasks => {
                *slept = None;
                drop(slept);
                self.stage = Stage::Waiting;
            }
            Stage::Waiting => {
                if let Some(wait) = slept.take() {
                    return Poll::Ready(wait);
                }
            }
        }
        *self.idle.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.waker().clone());
        Poll::Pending
    }
}
