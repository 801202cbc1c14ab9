//! One microVM that runs, watched from its start or its adoption to its end: its guest is greeted and configured,
//! its lines are stored, its health is checked, and what happens to it is told as [`Event`]s.
//!
//! Dropping a [`Machine`] ends the watching and leaves the microVM as it is (I5, I7). The guest is hostile: nothing
//! that it says can do more than end itself.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use holdfast_guest::config::Secrets;
use holdfast_model::InstanceId;
use holdfast_model::agent::LogStream;
use holdfast_model::manifest::Health;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::exec::Execs;
use crate::health::{Checker, Verdict};
use crate::image::RootImage;
use crate::logs::{Line, Ring, chain};
use crate::phase::{Cause, Event};
use crate::secrets::{NodeSecretsError, NodeSecretsStore};
use crate::vmm::channel::{
    self, ChannelError, ExitStatus, GuestChannel, GuestConfig, GuestEvent, GuestReceiver, GuestSender,
    GuestState,
};
use crate::vmm::{Vm, VmEnd, VmmError};

/// How long a guest may take to say hello. A working one needs well under a second on KVM; translated guests on a
/// busy host need many.
const HELLO_DEADLINE: Duration = Duration::from_secs(60);

/// How long a guest may take from its hello to its workload's start, if it knows what to run.
const WORKLOAD_DEADLINE: Duration = Duration::from_secs(60);

/// How often a channel may break before its guest is given up, unless it held for [`CHANNEL_HELD`].
const BREAKS_MAX: u32 = 5;

/// A channel that lasted so long was a good one.
const CHANNEL_HELD: Duration = Duration::from_secs(60);

/// Pause before a channel is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// What a guest may take over its grace to stop, in order to deliver what it still has and leave.
const STOP_SLACK: Duration = Duration::from_secs(5);

/// How long a guest may take to leave once its workload has ended.
const LEAVE_DEADLINE: Duration = Duration::from_secs(5);

/// Lines that are stored in one write at most.
const BATCH_LINES_MAX: usize = 64;

/// In so much time…
const PACE_WINDOW: Duration = Duration::from_millis(500);

/// …so many lines of a guest are taken, plus one batch…
const WINDOW_LINES_MAX: usize = 5_000;

/// …or so many bytes, plus one batch.
const WINDOW_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Where a machine's events go; awaited, so that a slow agent slows its guests' events and drops none.
pub type Tell = Arc<dyn Fn(Event) -> BoxFuture<'static, ()> + Send + Sync>;

/// What is needed to watch a microVM.
pub struct Brief {
    /// Sent to a guest that waits for it; `None` if nothing is known to run.
    pub config: Option<GuestConfig>,
    /// Where its secrets are, sealed: they are opened when the guest waits for them, and not kept.
    pub secrets: (InstanceId, Arc<NodeSecretsStore>),
    /// How to tell that it serves.
    pub health: Option<Health>,
    /// Whether an instance without a health check counts as healthy once its workload runs.
    pub known: bool,
    /// Whether an earlier agent saw its workload run: then it is given its grace before it is killed, even if it
    /// was not greeted again yet.
    pub runs: bool,
    /// Whether an earlier agent found it healthy.
    pub ready: bool,
    /// Where its lines go.
    pub ring: Arc<Ring>,
    /// Where it is known that its guest can be asked to run programs.
    pub execs: Arc<Execs>,
    /// Kept from being collected while the microVM runs.
    pub root: Option<RootImage>,
    /// Given back when the guest is up, so that not too many boot at the same time.
    pub booting: Option<OwnedSemaphorePermit>,
    /// Where its events go.
    pub tell: Tell,
}

/// A hold on a microVM that is watched.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<Vm>,
    stop: mpsc::Sender<Duration>,
    stage: watch::Receiver<Stage>,
    watch: JoinHandle<()>,
}

impl Machine {
    /// Begins to watch.
    pub fn new(vm: Vm, brief: Brief) -> Self {
        let vm = Arc::new(vm);
        let (stop, stops) = mpsc::channel(1);
        let (stage, seen) = watch::channel(if brief.runs { Stage::Running } else { Stage::Booting });
        let watcher = Watcher { vm: Arc::clone(&vm), brief, stops, stage };
        Self { vm, stop, stage: seen, watch: tokio::spawn(watcher.run()) }
    }

    /// The microVM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Asks the workload to stop, with KILL after the grace, and waits until the microVM has left or is late.
    /// Returns at once if no workload is known to run.
    pub async fn stop(&self, grace: Duration) {
        if *self.stage.borrow() == Stage::Booting {
            return;
        }
        // A full queue means that it was asked already.
        self.stop.try_send(grace).ok();
        // Late or gone: whoever called kills what is left.
        tokio::time::timeout(grace + STOP_SLACK, self.vm.ended()).await.ok();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Booting,
    Running,
    Stopping,
}

type End = (Cause, String);

/// How fast a guest is listened to: what it writes costs the host's processors and disk. A guest that writes more
/// loses lines in its own buffer, and the log says how many.
#[derive(Debug)]
struct Pace {
    window_began_at: Instant,
    lines: usize,
    bytes: usize,
    /// Nothing is read before.
    resume_at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { window_began_at: now, lines: 0, bytes: 0, resume_at: now }
    }

    fn take(&mut self, lines: usize, bytes: usize, now: Instant) {
        if now.duration_since(self.window_began_at) >= PACE_WINDOW {
            *self = Self::new(now);
        }
        self.lines += lines;
        self.bytes += bytes;
        if self.lines >= WINDOW_LINES_MAX || self.bytes >= WINDOW_BYTES_MAX {
            self.resume_at = self.window_began_at + PACE_WINDOW;
        }
    }
}

struct Watcher {
    vm: Arc<Vm>,
    brief: Brief,
    stops: mpsc::Receiver<Duration>,
    stage: watch::Sender<Stage>,
}

impl Watcher {
    async fn run(mut self) {
        let vm = Arc::clone(&self.vm);
        let mut ended = pin!(vm.ended());
        let (cause, detail) = tokio::select! {
            end = &mut ended => self.vm_end(end),
            end = self.converse() => {
                if tokio::time::timeout(LEAVE_DEADLINE, ended).await.is_err() {
                    tracing::debug!(instance = vm.instance_id(), "the guest did not leave by itself");
                }
                end
            }
        };
        self.remark(&format!("ended: {detail}"));
        (self.brief.tell)(Event::Ended { cause, detail }).await;
    }

    fn vm_end(&self, end: Result<VmEnd, VmmError>) -> End {
        let detail = match end {
            Ok(VmEnd::OutOfMemory) => return (Cause::OutOfMemory, VmEnd::OutOfMemory.to_string()),
            Ok(end) => end.to_string(),
            Err(error) => chain(&error),
        };
        match *self.stage.borrow() {
            Stage::Booting => (Cause::VmmStart, format!("{detail}; console: {}", self.vm.console_said())),
            Stage::Running | Stage::Stopping => (Cause::Crashed, detail),
        }
    }

    /// Speaks with the guest until its workload has ended or nothing can be expected from it any more.
    async fn converse(&mut self) -> End {
        let mut breaks = 0;
        loop {
            let address = self.vm.channel();
            let opened = GuestChannel::connect(&address, self.brief.ring.guest_seq(), HELLO_DEADLINE).await;
            let error = match opened {
                Ok(channel) => {
                    let opened_at = Instant::now();
                    match self.session(channel).await {
                        Ok(end) => return end,
                        Err(error) => {
                            breaks = if opened_at.elapsed() >= CHANNEL_HELD { 1 } else { breaks + 1 };
                            error
                        }
                    }
                }
                Err(error @ ChannelError::NoHello { .. }) => {
                    let said = self.vm.console_said();
                    return (Cause::VmmStart, format!("{}; console: {said}", chain(&error)));
                }
                Err(error) => {
                    breaks += 1;
                    error
                }
            };
            if breaks >= BREAKS_MAX {
                return (Cause::Crashed, chain(&error));
            }
            tracing::debug!(instance = self.vm.instance_id(), breaks, error = %chain(&error), "the channel broke");
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    /// One session. An error means that the channel broke while the microVM may be well.
    async fn session(&mut self, channel: GuestChannel) -> Result<End, ChannelError> {
        let GuestChannel { hello, sender, receiver } = channel;
        self.brief.booting = None;
        match hello.state {
            GuestState::AwaitingConfig => {
                if let Some(config) = &self.brief.config {
                    let now_unix_ms = now_ms();
                    let secrets = match self.open_secrets() {
                        Ok(secrets) => secrets,
                        Err(error) => return Ok((Cause::Secrets, chain(&error))),
                    };
                    sender.configure(&GuestConfig { now_unix_ms, secrets, ..config.clone() }).await?;
                }
            }
            GuestState::Running => self.workload_runs().await,
            GuestState::Stopping => {
                self.stage.send_replace(Stage::Stopping);
            }
            // It tells so again, after the lines that were not stored yet.
            GuestState::Exited(_) => {}
            GuestState::Failed { reason } => return Ok((Cause::Crashed, reason)),
        }
        // Until this session ends.
        let instance = self.vm.instance_id().parse();
        let _open = instance.ok().map(|instance| self.brief.execs.open(instance, sender.clone()));
        let told = self.brief.config.is_some();
        let mut checker = self.brief.health.as_ref().map(|health| Checker::new(health, self.brief.ready));
        let (stage, booting) = (self.stage.subscribe(), self.stage.subscribe());
        let tell = Arc::clone(&self.brief.tell);
        tokio::select! {
            end = self.listen(receiver, &sender) => end,
            end = check(checker.as_mut(), &sender, stage, tell) => end,
            end = idle(booting), if told => Ok(end),
        }
    }

    fn open_secrets(&self) -> Result<Option<Secrets>, NodeSecretsError> {
        let (id, secrets) = &self.brief.secrets;
        secrets.open_for_guest(*id)
    }

    /// Stores and tells what the guest says, and passes on the request to stop.
    async fn listen(
        &mut self,
        mut receiver: GuestReceiver,
        sender: &GuestSender,
    ) -> Result<End, ChannelError> {
        let mut pace = Pace::new(Instant::now());
        loop {
            let next = async {
                tokio::time::sleep_until(pace.resume_at).await;
                receiver.recv().await
            };
            let event = tokio::select! {
                event = next => event?,
                Some(grace) = self.stops.recv() => {
                    self.stage.send_replace(Stage::Stopping);
                    sender.stop(grace).await?;
                    continue;
                }
            };
            let mut event = Some(event);
            let mut lines = Vec::new();
            while let Some(GuestEvent::Log(line)) = event {
                lines.push(line);
                // More lines that are here already make one write with the first.
                let more = if lines.len() < BATCH_LINES_MAX { receiver.recv().now_or_never() } else { None };
                event = more.transpose()?;
            }
            let bytes = lines.iter().map(|line| line.bytes.len()).sum();
            pace.take(lines.len(), bytes, Instant::now());
            self.store(lines);
            match event {
                Some(GuestEvent::Ready { .. }) => self.workload_runs().await,
                Some(GuestEvent::Failed { reason }) => return Ok((Cause::Crashed, reason)),
                Some(GuestEvent::Exited(status)) => {
                    // It leaves by itself in the end, if this does not reach it.
                    sender.dismiss().await.ok();
                    return Ok(self.exit(status));
                }
                Some(GuestEvent::ConfigApplied | GuestEvent::Log(_)) | None => {}
            }
        }
    }

    async fn workload_runs(&self) {
        self.stage.send_if_modified(|stage| {
            let booting = *stage == Stage::Booting;
            if booting {
                *stage = Stage::Running;
            }
            booting
        });
        (self.brief.tell)(Event::WorkloadRunning).await;
        if self.brief.health.is_none() && self.brief.known {
            (self.brief.tell)(Event::Healthy).await;
        }
    }

    fn exit(&self, status: ExitStatus) -> End {
        let detail = status.to_string();
        let stopping = *self.stage.borrow() == Stage::Stopping;
        match status {
            ExitStatus::Code(0) => (Cause::Finished, detail),
            // The kernel kills with that signal, and says on the console why.
            ExitStatus::Signal(libc::SIGKILL) if !stopping && self.console_tells_of_memory() => {
                (Cause::OutOfMemory, "the guest's memory was used up".to_owned())
            }
            ExitStatus::Code(_) | ExitStatus::Signal(_) => (Cause::Crashed, detail),
        }
    }

    fn console_tells_of_memory(&self) -> bool {
        self.vm.console_said().contains("Out of memory")
    }

    fn store(&self, lines: Vec<channel::LogLine>) {
        if lines.is_empty() {
            return;
        }
        let mut expected = self.brief.ring.guest_seq().saturating_add(1);
        let mut stored = Vec::with_capacity(lines.len() + 1);
        let time_ms = now_ms();
        for line in lines {
            // The guest loses lines whenever it has no room, also between two that come together.
            let lost = line.seq.saturating_sub(expected);
            if lost > 0 {
                let why = "the instance wrote faster than they could be stored";
                stored.push(Line::dropped(time_ms, lost, why));
            }
            expected = line.seq.saturating_add(1);
            stored.push(Line {
                time_ms,
                stream: match line.stream {
                    channel::LogStream::Stdout => LogStream::Stdout,
                    channel::LogStream::Stderr => LogStream::Stderr,
                    channel::LogStream::Init => LogStream::System,
                },
                guest_seq: line.seq,
                bytes: line.bytes,
                continues: line.continues,
                dropped: 0,
            });
        }
        self.append(&stored);
    }

    fn remark(&self, text: &str) {
        self.append(&[Line::remark(now_ms(), text)]);
    }

    fn append(&self, lines: &[Line]) {
        if let Err(error) = self.brief.ring.append(lines) {
            tracing::warn!(instance = self.vm.instance_id(), error = %chain(&error), "lines were not stored");
        }
    }
}

/// Checks while the workload runs, and ends when it must be started again.
async fn check(
    checker: Option<&mut Checker>,
    sender: &GuestSender,
    mut stage: watch::Receiver<Stage>,
    tell: Tell,
) -> Result<End, ChannelError> {
    let Some(checker) = checker else { return pending().await };
    // The sender lives as long as the session.
    stage.wait_for(|stage| *stage == Stage::Running).await.ok();
    loop {
        let verdict = tokio::select! {
            verdict = checker.next_verdict(sender) => verdict?,
            // A workload that was told to stop is not asked any more.
            () = stopping(&mut stage) => return pending().await,
        };
        match verdict {
            Verdict::Healthy => tell(Event::Healthy).await,
            Verdict::Unhealthy { detail } => {
                return Ok((Cause::Unhealthy, format!("health check failed: {detail}")));
            }
        }
    }
}

/// Ends when a guest that knows what to run has not started it for too long.
async fn idle(mut stage: watch::Receiver<Stage>) -> End {
    let started = async {
        stage.wait_for(|stage| *stage != Stage::Booting).await.ok();
    };
    match tokio::time::timeout(WORKLOAD_DEADLINE, started).await {
        Ok(()) => pending().await,
        Err(_) => {
            let seconds = WORKLOAD_DEADLINE.as_secs();
            (Cause::VmmStart, format!("the guest did not start its workload within {seconds} s"))
        }
    }
}

async fn stopping(stage: &mut watch::Receiver<Stage>) {
    stage.wait_for(|stage| *stage == Stage::Stopping).await.ok();
}

/// The host's clock, in milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn i14_a_guest_that_floods_is_listened_to_at_a_pace() {
        let began = Instant::now();
        let ms = |ms| began + Duration::from_millis(ms);
        let mut pace = Pace::new(began);
        pace.take(WINDOW_LINES_MAX - 1, 10, ms(1));
        assert!(pace.resume_at <= ms(1));
        pace.take(1, 10, ms(2));
        assert_eq!(pace.resume_at, began + PACE_WINDOW);
        // The next window is a new one.
        pace.take(1, WINDOW_BYTES_MAX - 1, ms(500));
        assert!(pace.resume_at <= ms(500));
        pace.take(1, 1, ms(600));
        assert_eq!(pace.resume_at, ms(500) + PACE_WINDOW);
    }
}
