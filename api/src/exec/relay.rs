//! Passes the frames of one session on in both directions, until the program ends or the session must.

use super::watch::taken_away;
use super::{FrameReader, FrameWriter, NodePart};
use crate::caller::Caller;
use crate::problem::Refusal;
use crate::service::Service;
use holdfast_model::ExecGrantId;
use holdfast_model::exec::{EXEC_REASON_BYTES_MAX, ExecEnd, ExecInput, ExecOutput, ExecStatus};
use std::time::Duration;
use tokio::time::Instant;

/// How long either side may take to hear its last word, in milliseconds.
const LAST_WORD_MS_MAX: u64 = 2_000;

/// What a person is told when the node's end breaks off.
const NODE_GONE: &str = "The instance's node broke off: its agent was restarted, or cannot be reached. What ran in the \
                         session was hung up.";

/// A session whose parts are both here.
pub(crate) struct Session {
    /// By which grant.
    pub(crate) grant: ExecGrantId,
    /// When it began, by this member's monotonic clock.
    pub(crate) began: Instant,
    /// How long it may last.
    pub(crate) lasts: Duration,
}

/// How a session ended.
pub(crate) struct Ended {
    /// How.
    pub(crate) end: ExecEnd,
    /// The program's exit code.
    pub(crate) code: Option<i32>,
    /// For people.
    reason: String,
}

impl Ended {
    fn by(end: ExecEnd, reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        reason.truncate(reason.floor_char_boundary(EXEC_REASON_BYTES_MAX));
        Self { end, code: None, reason }
    }

    /// Whether the program must not run on.
    const fn kills(&self) -> bool {
        matches!(self.end, ExecEnd::Timeout | ExecEnd::Revoked)
    }
}

/// Passes a session on, to its end.
pub(crate) async fn relay(
    service: &Service,
    session: &Session,
    person: &Caller,
    mut from_person: FrameReader<ExecInput>,
    to_person: FrameWriter<ExecOutput>,
    node: NodePart,
) -> Ended {
    let NodePart { reader: mut from_node, writer: to_node, caller: node } = node;
    // In this order: what must be cut is cut though much is said, and a program that ended has ended, though the person
    // hangs up in the same moment.
    let ended = tokio::select! {
        biased;
        (end, reason) = taken_away(service, session, person, &node) => Ended::by(end, reason),
        () = tokio::time::sleep_until(session.began + session.lasts) => {
            Ended::by(ExecEnd::Timeout, "The session's time is over; it was cut off.")
        }
        ended = outward(&mut from_node, &to_person) => ended,
        ended = inward(&mut from_person, &to_node) => ended,
        () = to_person.closed() => Ended::by(ExecEnd::ClientDisconnect, "The person's end broke off."),
    };
    let program_ended = matches!(ended.end, ExecEnd::Exited | ExecEnd::Killed | ExecEnd::Refused);
    let last = Duration::from_millis(LAST_WORD_MS_MAX);
    let told_node = async {
        if !program_ended {
            let close = ExecInput::Close { kill: ended.kills() };
            // A node that does not hear it finds the stream ended, and hangs the program up.
            drop(tokio::time::timeout(last, to_node.send(&close)).await);
        }
    };
    let told_person = async {
        let last_frame = ExecOutput::Ended { end: ended.end, reason: ended.reason.clone() };
        drop(tokio::time::timeout(last, to_person.send(&last_frame)).await);
    };
    tokio::join!(told_node, told_person);
    ended
}

/// From the program to the person.
async fn outward(from: &mut FrameReader<ExecOutput>, to: &FrameWriter<ExecOutput>) -> Ended {
    let broke = |refusal: Refusal| Ended::by(ExecEnd::Lost, refusal.detail);
    loop {
        let Some(frame) = from.next().await else {
            return Ended::by(ExecEnd::Lost, NODE_GONE);
        };
        let end = match &frame {
            ExecOutput::Started | ExecOutput::Stdout(_) | ExecOutput::Stderr(_) => None,
            ExecOutput::Exit(ExecStatus::Code(code)) => {
                Some(Ended { code: Some(*code), ..Ended::by(ExecEnd::Exited, "The program exited.") })
            }
            ExecOutput::Exit(ExecStatus::Signal(signal)) => {
                Some(Ended::by(ExecEnd::Killed, format!("The program was ended by signal {signal}.")))
            }
            // A node says only that it could not start the program, or lost it.
            ExecOutput::Ended { end: ExecEnd::Refused, reason } => {
                return Ended::by(ExecEnd::Refused, reason.clone());
            }
            ExecOutput::Ended { reason, .. } => return Ended::by(ExecEnd::Lost, reason.clone()),
        };
        match to.send(&frame).await {
            Ok(true) => {}
            Ok(false) if end.is_none() => {
                return Ended::by(ExecEnd::ClientDisconnect, "The person's end broke off.");
            }
            Ok(false) => {}
            Err(refusal) => return broke(refusal),
        }
        if let Some(end) = end {
            return end;
        }
    }
}

/// From the person to the program.
async fn inward(from: &mut FrameReader<ExecInput>, to: &FrameWriter<ExecInput>) -> Ended {
    loop {
        let frame = match from.next().await {
            None | Some(ExecInput::Close { .. } | ExecInput::Open { .. }) => {
                return Ended::by(ExecEnd::ClientDisconnect, "The person's end broke off.");
            }
            Some(frame) => frame,
        };
        match to.send(&frame).await {
            Ok(true) => {}
            // A node whose program ended hears no more. How it ended may still be on its way, behind output.
            Ok(false) => std::future::pending().await,
            Err(refusal) => return Ended::by(ExecEnd::Lost, refusal.detail),
        }
    }
}
