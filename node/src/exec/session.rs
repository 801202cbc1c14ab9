//! One session, from the dial to the end of the program or of its time.

use std::time::Duration;

use holdfast_client::{Client, ClientError, Endpoint, ExecReceiver, ExecSender, ExecStream};
use holdfast_guest::exec as guest;
use holdfast_model::exec::{
    ExecCall, ExecEnd, ExecInput, ExecOutput, ExecSignal, ExecSize, ExecStatus, ExecTerminal,
};
use tokio::time::Instant;

use crate::logs::chain;
use crate::phase::bounded;
use crate::vmm::channel::{ChannelError, ExitStatus, GuestSender};
use crate::vmm::exec::{Program, ProgramNews, ProgramWriter};

/// How long the member may take to hear the last word.
const LAST_WORD_MAX: Duration = Duration::from_secs(5);

/// A session that was asked for.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) member: Endpoint,
    pub(super) guest: GuestSender,
    pub(super) call: ExecCall,
}

/// How it ended.
enum End {
    /// The program is gone, and this is the last word of it.
    Said(ExecOutput),
    /// Nobody is there any more, or its time is over.
    Cut { kill: bool },
}

impl Session {
    pub(super) async fn run(self) {
        let (grant, instance) = (self.call.grant, self.call.instance);
        let until = Instant::now() + Duration::from_millis(self.call.ends_in_ms);
        let stream = match self.client.exec_for(self.member, grant).await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%grant, %instance, error = %chain(&error), "an exec session's member was not reached");
                return;
            }
        };
        let ExecStream { sender, mut receiver } = stream;
        let terminal = self.call.program.terminal.map(terminal);
        let said = match self.guest.run(self.call.program.argv, terminal).await {
            Ok(program) => converse(program, &sender, &mut receiver, until).await,
            Err(error) => Some(lost(ExecEnd::Refused, &error)),
        };
        if let Some(last) = said {
            // One that does not hear it finds the stream ended.
            tokio::time::timeout(LAST_WORD_MAX, say_last(&last, sender, &mut receiver)).await.ok();
        }
        tracing::debug!(%grant, %instance, "an exec session ended");
    }
}

/// Says the last word, and stays until the member has ended its part: whoever leaves before resets the stream, and what was
/// under way in it is lost.
async fn say_last(last: &ExecOutput, sender: ExecSender<ExecOutput>, receiver: &mut ExecReceiver<ExecInput>) {
    if sender.send(last).await.is_ok() {
        drop(sender);
        while let Ok(Some(_)) = receiver.next().await {}
    }
}

/// Passes on what is said in both directions, until it ends. Answers with the last word, if there is one.
async fn converse(
    mut program: Program,
    sender: &ExecSender<ExecOutput>,
    receiver: &mut ExecReceiver<ExecInput>,
    until: Instant,
) -> Option<ExecOutput> {
    let writer = program.writer();
    let end = tokio::select! {
        biased;
        end = outward(&mut program, sender) => end,
        end = inward(&writer, receiver) => end,
        () = sender.closed() => End::Cut { kill: false },
        () = tokio::time::sleep_until(until) => End::Cut { kill: true },
    };
    match end {
        End::Said(last) => Some(last),
        End::Cut { kill } => {
            if let Err(error) = program.hang_up(kill).await {
                tracing::debug!(error = %chain(&error), "a program was not hung up: its channel is gone, and it with it");
            }
            None
        }
    }
}

async fn outward(program: &mut Program, sender: &ExecSender<ExecOutput>) -> End {
    loop {
        let news = match program.news().await {
            Ok(news) => news,
            Err(error) => return End::Said(lost(ExecEnd::Lost, &error)),
        };
        let frame = match news {
            ProgramNews::Started => ExecOutput::Started,
            ProgramNews::Output(guest::ExecStream::Stdout, bytes) => ExecOutput::Stdout(bytes),
            ProgramNews::Output(guest::ExecStream::Stderr, bytes) => ExecOutput::Stderr(bytes),
            ProgramNews::Ended(ExitStatus::Code(code)) => {
                return End::Said(ExecOutput::Exit(ExecStatus::Code(code)));
            }
            ProgramNews::Ended(ExitStatus::Signal(signal)) => {
                return End::Said(ExecOutput::Exit(ExecStatus::Signal(signal)));
            }
            ProgramNews::Refused { reason } => {
                return End::Said(ExecOutput::Ended { end: ExecEnd::Refused, reason: bounded(reason) });
            }
            ProgramNews::Lost => {
                let reason = "The instance's guest broke off; it may have been restarted.".to_owned();
                return End::Said(ExecOutput::Ended { end: ExecEnd::Lost, reason });
            }
        };
        if sender.send(&frame).await.is_err() {
            return End::Cut { kill: false };
        }
    }
}

async fn inward(writer: &ProgramWriter, receiver: &mut ExecReceiver<ExecInput>) -> End {
    loop {
        let frame: Result<Option<ExecInput>, ClientError> = receiver.next().await;
        let passed = match frame {
            Ok(Some(ExecInput::Stdin(bytes))) => writer.input(&bytes).await,
            Ok(Some(ExecInput::StdinEnds)) => writer.end_input().await,
            Ok(Some(ExecInput::Resize(to))) => writer.resize(size(to)).await,
            Ok(Some(ExecInput::Signal(signal))) => writer.signal(signal_of(signal)).await,
            Ok(Some(ExecInput::Close { kill })) => return End::Cut { kill },
            // Only a person says so, and only to a member.
            Ok(Some(ExecInput::Open { .. })) | Ok(None) | Err(_) => return End::Cut { kill: false },
        };
        if let Err(error) = passed {
            return End::Said(lost(ExecEnd::Lost, &error));
        }
    }
}

fn lost(end: ExecEnd, error: &ChannelError) -> ExecOutput {
    ExecOutput::Ended { end, reason: bounded(chain(error)) }
}

fn size(size: ExecSize) -> guest::TerminalSize {
    guest::TerminalSize { rows: size.rows, columns: size.columns }
}

fn terminal(terminal: ExecTerminal) -> guest::Terminal {
    guest::Terminal { kind: terminal.kind, size: size(terminal.size) }
}

const fn signal_of(signal: ExecSignal) -> guest::ExecSignal {
    match signal {
        ExecSignal::Int => guest::ExecSignal::Int,
        ExecSignal::Term => guest::ExecSignal::Term,
        ExecSignal::Kill => guest::ExecSignal::Kill,
        ExecSignal::Hup => guest::ExecSignal::Hup,
    }
}
