//! Proposals on their way to the log, many at a time.
//!
//! An entry of the log costs nearly the same with one command in it as with hundreds: messages inside the core, a record
//! with its checksum, a place in every replication request, an answer. So commands gather while others are under way:
//! the leader writes what waits as one entry, and a follower sends what waits as one message. A command that comes while
//! nothing is under way goes at once and alone, so nobody waits for company.
//!
//! Nothing here looks into a command, repeats one or loses one silently: each that was taken is answered, or its sender
//! hears that nobody knows. Every command keeps its own outcome and its own identity (I4).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use holdfast_model::{MemberId, Outcome};
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::transport::message::Refusal;
use crate::types::{LeaderId, LogCommand};

/// Commands of one batch.
pub(crate) const BATCH_COMMANDS_MAX: usize = 256;
/// Bytes of one batch, or one command if that is larger.
pub(crate) const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// Commands that may wait for a batch.
const WAITING_COMMANDS_MAX: usize = 16_384;
/// Bytes of commands that may wait for a batch.
const WAITING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What became of one command.
pub(crate) type Told = Result<Outcome, Refusal>;

/// Why commands were not taken or not answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SubmitError {
    /// Too much waits; nothing was done.
    Full,
    /// All of them were refused.
    Refused(Refusal),
}

/// How much may be sent at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Commands of one batch.
    pub(crate) commands: usize,
    /// Batches under way. When there are so many, commands gather.
    pub(crate) under_way: usize,
}

/// Where batches go.
pub(crate) trait Destination: Send + Sync + 'static {
    /// How much may be sent at once, at this moment.
    fn limits(&self) -> Limits;
    /// Sends one batch. Resolves within a bounded time, with an answer for each command in their order; a refusal is
    /// everybody's. With `only_as`, nothing may be done unless this member leads as just that leader.
    fn send(
        &self,
        commands: Vec<LogCommand>,
        only_as: Option<LeaderId>,
    ) -> BoxFuture<'static, Result<Vec<Told>, Refusal>>;
}

/// Commands that came together and are answered together.
struct Group {
    commands: Vec<LogCommand>,
    bytes: usize,
    only_as: Option<LeaderId>,
    answer: oneshot::Sender<Result<Vec<Told>, Refusal>>,
}

/// Gathers commands for one destination.
#[derive(Default)]
pub(crate) struct Batches {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

#[derive(Default)]
struct Waiting {
    groups: VecDeque<Group>,
    commands: usize,
    bytes: usize,
    closed: bool,
}

impl Batches {
    /// Hands commands over, at most [`BATCH_COMMANDS_MAX`] and [`BATCH_BYTES_MAX`] or a single one, and waits for their
    /// answers. They stay together. When the caller stops waiting they may still be carried out.
    pub(crate) async fn submit(
        &self,
        commands: Vec<LogCommand>,
        only_as: Option<LeaderId>,
    ) -> Result<Vec<Told>, SubmitError> {
        let (answer, answered) = oneshot::channel();
        let bytes = commands.iter().map(|command| command.bytes().len()).sum();
        self.put(Group { commands, bytes, only_as, answer })?;
        self.arrived.notify_one();
        match answered.await {
            Ok(result) => result.map_err(SubmitError::Refused),
            Err(_dropped) => Err(SubmitError::Refused(unknown())),
        }
    }

    /// The same for one command.
    pub(crate) async fn submit_one(
        &self,
        command: LogCommand,
        only_as: Option<LeaderId>,
    ) -> Result<Outcome, SubmitError> {
        match self.submit(vec![command], only_as).await?.pop() {
            Some(told) => told.map_err(SubmitError::Refused),
            None => Err(SubmitError::Refused(unknown())),
        }
    }

    fn put(&self, group: Group) -> Result<(), SubmitError> {
        let Ok(mut waiting) = self.waiting.lock() else { return Err(SubmitError::Full) };
        if waiting.closed {
            return Err(SubmitError::Refused(Refusal::Unavailable("it is shutting down".to_owned())));
        }
        let commands = waiting.commands + group.commands.len();
        let bytes = waiting.bytes + group.bytes;
        if commands > WAITING_COMMANDS_MAX || bytes > WAITING_BYTES_MAX {
            return Err(SubmitError::Full);
        }
        (waiting.commands, waiting.bytes) = (commands, bytes);
        waiting.groups.push_back(group);
        Ok(())
    }

    /// The next groups that go together. Those whose senders are gone are dropped: nothing was done for them.
    fn take(&self, limits: Limits) -> Vec<Group> {
        let (mut taken, mut commands, mut bytes) = (Vec::new(), 0, 0);
        let Ok(mut waiting) = self.waiting.lock() else { return taken };
        while let Some(next) = waiting.groups.front() {
            let abandoned = next.answer.is_closed();
            let fits = commands + next.commands.len() <= limits.commands
                && bytes + next.bytes <= BATCH_BYTES_MAX
                && next.only_as.is_none();
            if !abandoned && !fits && !taken.is_empty() {
                break;
            }
            let alone = next.only_as.is_some();
            let Some(group) = waiting.groups.pop_front() else { break };
            waiting.commands -= group.commands.len();
            waiting.bytes -= group.bytes;
            if abandoned {
                continue;
            }
            commands += group.commands.len();
            bytes += group.bytes;
            taken.push(group);
            if alone {
                break;
            }
        }
        taken
    }

    /// Carries batches to their destination until `stop` is cancelled. What waits then is answered with a refusal, and
    /// what is under way with that nobody knows.
    ///
    /// Looks again at what the destination allows whenever the leader changes.
    pub(crate) async fn run(
        self: Arc<Self>,
        destination: impl Destination,
        mut leader: watch::Receiver<Option<MemberId>>,
        stop: CancellationToken,
    ) {
        let mut under_way = FuturesUnordered::new();
        loop {
            let limits = destination.limits();
            while under_way.len() < limits.under_way {
                let groups = self.take(limits);
                if groups.is_empty() {
                    break;
                }
                let only_as = groups[0].only_as;
                let commands = groups.iter().flat_map(|group| group.commands.iter().cloned()).collect();
                let sent = destination.send(commands, only_as);
                under_way.push(async move { tell(groups, sent.await) });
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(()) = under_way.next(), if !under_way.is_empty() => {}
                () = self.arrived.notified(), if under_way.len() < limits.under_way => {}
                changed = leader.changed() => if changed.is_err() { break },
            }
        }
        if let Ok(mut waiting) = self.waiting.lock() {
            waiting.closed = true;
            for group in std::mem::take(&mut waiting.groups) {
                let refusal = Refusal::Unavailable("it is shutting down".to_owned());
                // A sender that stopped waiting needs no answer.
                drop(group.answer.send(Err(refusal)));
            }
        }
    }
}

/// Gives each group its part of the answers.
fn tell(groups: Vec<Group>, answers: Result<Vec<Told>, Refusal>) {
    let expected: usize = groups.iter().map(|group| group.commands.len()).sum();
    let answers = answers.and_then(|told| if told.len() == expected { Ok(told) } else { Err(unknown()) });
    match answers {
        Ok(told) => {
            let mut told = told.into_iter();
            for group in groups {
                let part = told.by_ref().take(group.commands.len()).collect();
                drop(group.answer.send(Ok(part)));
            }
        }
        Err(refusal) => {
            for group in groups {
                drop(group.answer.send(Err(refusal.clone())));
            }
        }
    }
}

fn unknown() -> Refusal {
    Refusal::Unknown("no answer came".to_owned())
}

#[cfg(test)]
mod tests {
    use holdfast_model::{Accepted, Output, Revision};
    use tokio::sync::{Semaphore, mpsc};

    use super::*;

    /// Tells what it is sent, and answers each batch when it may: every command with its own bytes, as a number.
    struct Slow {
        sent: mpsc::UnboundedSender<Vec<LogCommand>>,
        may_answer: Arc<Semaphore>,
        limits: Limits,
    }

    fn command(number: u16) -> LogCommand {
        LogCommand::from_wire(number.to_le_bytes().to_vec().into()).unwrap()
    }

    fn outcome(number: u16) -> Outcome {
        Ok(Accepted { revision: Revision(u64::from(number)), output: Output::None })
    }

    impl Destination for Slow {
        fn limits(&self) -> Limits {
            self.limits
        }

        fn send(
            &self,
            commands: Vec<LogCommand>,
            _only_as: Option<LeaderId>,
        ) -> BoxFuture<'static, Result<Vec<Told>, Refusal>> {
            let number = |command: &LogCommand| u16::from_le_bytes([command.bytes()[0], command.bytes()[1]]);
            let told = commands.iter().map(|command| Ok(outcome(number(command)))).collect();
            self.sent.send(commands).unwrap();
            let may_answer = self.may_answer.clone();
            Box::pin(async move {
                may_answer.acquire().await.unwrap().forget();
                Ok(told)
            })
        }
    }

    struct Running {
        batches: Arc<Batches>,
        sent: mpsc::UnboundedReceiver<Vec<LogCommand>>,
        may_answer: Arc<Semaphore>,
        stop: CancellationToken,
        _leader: watch::Sender<Option<MemberId>>,
    }

    fn run(under_way: usize) -> Running {
        let (sender, sent) = mpsc::unbounded_channel();
        let (leader, changes) = watch::channel(None);
        let limits = Limits { commands: BATCH_COMMANDS_MAX, under_way };
        let (may_answer, stop) = (Arc::new(Semaphore::new(0)), CancellationToken::new());
        let slow = Slow { sent: sender, may_answer: may_answer.clone(), limits };
        let batches = Arc::new(Batches::default());
        tokio::spawn(batches.clone().run(slow, changes, stop.clone()));
        Running { batches, sent, may_answer, stop, _leader: leader }
    }

    impl Running {
        /// Submits one command and waits until it has its place.
        async fn submit(&self, number: u16) -> tokio::task::JoinHandle<Result<Outcome, SubmitError>> {
            let batches = self.batches.clone();
            let task = tokio::spawn(async move { batches.submit_one(command(number), None).await });
            tokio::task::yield_now().await;
            task
        }
    }

    #[tokio::test]
    async fn what_comes_while_a_batch_is_under_way_goes_together_and_each_gets_its_own_answer() {
        let mut running = run(1);
        let first = running.submit(0).await;
        assert_eq!(running.sent.recv().await.unwrap(), [command(0)], "the first waits for nobody");
        let mut rest = Vec::new();
        for number in 1..=300 {
            rest.push(running.submit(number).await);
        }
        running.may_answer.add_permits(3);
        assert_eq!(first.await.unwrap(), Ok(outcome(0)));
        let full: Vec<_> = (1..=256).map(command).collect();
        assert_eq!(running.sent.recv().await.unwrap(), full);
        assert_eq!(running.sent.recv().await.unwrap().len(), 300 - 256);
        for (number, waiting) in (1..).zip(rest) {
            assert_eq!(waiting.await.unwrap(), Ok(outcome(number)), "an answer went to another command");
        }
    }

    #[tokio::test]
    async fn a_batch_has_bounded_bytes_and_one_large_command_still_goes() {
        let mut running = run(1);
        let first = running.submit(0).await;
        running.sent.recv().await.unwrap();
        let large = LogCommand::from_wire(vec![0; BATCH_BYTES_MAX].into()).unwrap();
        let batches = running.batches.clone();
        let second = tokio::spawn(async move { batches.submit_one(large, None).await });
        tokio::task::yield_now().await;
        let third = running.submit(3).await;
        running.may_answer.add_permits(3);
        assert_eq!(running.sent.recv().await.unwrap().len(), 1);
        assert_eq!(running.sent.recv().await.unwrap(), [command(3)]);
        for waiting in [first, second, third] {
            waiting.await.unwrap().unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn i07_what_only_one_leader_may_write_goes_alone() {
        let mut running = run(1);
        let first = running.submit(0).await;
        running.sent.recv().await.unwrap();
        let before = running.submit(1).await;
        let only_as = Some(LeaderId { term: 1, node_id: 1 });
        let batches = running.batches.clone();
        let alone = tokio::spawn(async move { batches.submit_one(command(2), only_as).await });
        tokio::task::yield_now().await;
        let after = running.submit(3).await;
        running.may_answer.add_permits(4);
        for expected in [1, 2, 3] {
            assert_eq!(running.sent.recv().await.unwrap(), [command(expected)]);
        }
        for waiting in [first, before, alone, after] {
            waiting.await.unwrap().unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn too_much_that_waits_is_refused_at_once() {
        let batches = Batches::default();
        let wait = |count: usize, bytes: usize| {
            let commands = vec![LogCommand::from_wire(vec![0; bytes].into()).unwrap(); count];
            batches.put(Group { bytes: count * bytes, commands, only_as: None, answer: oneshot::channel().0 })
        };
        for _ in 0..WAITING_COMMANDS_MAX / 256 {
            wait(256, 1).unwrap();
        }
        assert_eq!(wait(1, 1), Err(SubmitError::Full));
        let taken = batches.take(Limits { commands: 1024, under_way: 1 });
        assert!(taken.is_empty(), "somebody was served who had stopped waiting");
        for _ in 0..WAITING_BYTES_MAX / (1024 * 1024) {
            wait(1, 1024 * 1024).unwrap();
        }
        assert_eq!(wait(1, 1), Err(SubmitError::Full));
    }

    #[tokio::test]
    async fn at_the_end_nobody_waits_for_ever() {
        let mut running = run(1);
        let under_way = running.submit(0).await;
        running.sent.recv().await.unwrap();
        let waiting = running.submit(1).await;
        running.stop.cancel();
        let told = under_way.await.unwrap();
        assert!(matches!(told, Err(SubmitError::Refused(Refusal::Unknown(_)))), "it may have been stored");
        let told = waiting.await.unwrap();
        assert!(matches!(told, Err(SubmitError::Refused(Refusal::Unavailable(_)))), "nothing was done");
        let late = running.submit(2).await.await.unwrap();
        assert!(matches!(late, Err(SubmitError::Refused(Refusal::Unavailable(_)))));
    }
}
