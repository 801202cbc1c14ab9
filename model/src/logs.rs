//! What is said of instances' lines: by a node to a member, and by a member to a tenant.
//!
//! Lines are numbered without a gap by the ring that holds them. A [`LogCursor`] names a place in a ring in a way that
//! stays true when the agent, the node's host or the member that is asked is another: who goes on from a cursor is
//! given no line twice, and is told how many were lost.

use crate::agent::LogStream;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A place in an instance's log: behind a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogCursor {
    /// Which counting the number belongs to. A node begins another one when it may have lost lines that it had given
    /// out, because its host lost power or its disk was replaced.
    pub epoch: u64,
    /// The line's number; 0 is before the first.
    pub seq: u64,
}

/// Text that is no [`LogCursor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cursor is two numbers with a dash between them, as an earlier line carried it")]
pub struct LogCursorError;

impl fmt::Display for LogCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

impl FromStr for LogCursor {
    type Err = LogCursorError;

    fn from_str(text: &str) -> Result<Self, LogCursorError> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse().ok()).flatten().ok_or(LogCursorError)
        };
        let (epoch, seq) = text.split_once('-').ok_or(LogCursorError)?;
        Ok(Self { epoch: number(epoch)?, seq: number(seq)? })
    }
}

impl TryFrom<String> for LogCursor {
    type Error = LogCursorError;

    fn try_from(text: String) -> Result<Self, LogCursorError> {
        text.parse()
    }
}

impl From<LogCursor> for String {
    fn from(cursor: LogCursor) -> Self {
        cursor.to_string()
    }
}

/// Where to begin to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogStart {
    /// Behind this line. The rest counts only without it.
    pub after: Option<LogCursor>,
    /// With the first line at or after this time, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// With the last so many of these lines; `None` with the first.
    pub tail: Option<u64>,
}

/// One line of an instance, as its node keeps it. Encoded without names between members: its fields never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// The line's number.
    pub seq: u64,
    /// When the node got it, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Where it came from.
    pub stream: LogStream,
    /// The line without its end, lossily decoded.
    pub text: String,
    /// The line's bytes in base64, if they are not the text's.
    pub base64: Option<String>,
    /// Whether the line goes on in the next one of this stream.
    pub continues: bool,
    /// How many lines are missing here; then this is the platform's remark about it.
    pub dropped: u64,
}

/// What a node has after a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogChunk {
    /// Oldest first.
    pub entries: Vec<LogEntry>,
    /// Behind the last of them, or where reading stands.
    pub next: LogCursor,
    /// Lines between the reader's cursor and the first of these that are no longer kept.
    pub missed: u64,
    /// Whether there are more lines now.
    pub more: bool,
}

/// One item of a stream of lines, as a tenant reads it: JSON, one a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LogRecord {
    /// A line.
    Line(LogText),
    /// Lines that were written and are no longer kept: a reader that was away for too long.
    Dropped {
        /// How many.
        lines: u64,
    },
    /// The lines cannot be had now. A stream that follows goes on as soon as they can.
    Away {
        /// Why, and what to do.
        detail: String,
        /// Whether the stream ends with this, also one that follows: the instance has ended, and its node is away, so
        /// that nobody knows when what it wrote last can be had.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        ended: bool,
    },
    /// All that was asked for has been sent. A stream without it was cut: go on from the last cursor.
    End {
        /// Behind the last line.
        #[schema(value_type = Option<String>)]
        cursor: Option<LogCursor>,
    },
}

/// A line in a [`LogRecord`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LogText {
    /// To go on behind this line, from any member.
    #[schema(value_type = String)]
    pub cursor: LogCursor,
    /// When the node got it, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Where it came from.
    pub stream: LogStream,
    /// The line without its end, lossily decoded. It is what the workload wrote, terminal sequences and all.
    pub text: String,
    /// The line's bytes in base64, if they are not the text's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// Whether the line goes on in the next one of this stream: it is longer than 16 KiB.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
    /// How many lines are missing here; then this is the platform's remark about it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl LogEntry {
    /// The line as a tenant reads it.
    pub fn into_record(self, epoch: u64) -> LogRecord {
        let Self { seq, time_ms, stream, text, base64, continues, dropped } = self;
        let cursor = LogCursor { epoch, seq };
        LogRecord::Line(LogText { cursor, time_ms, stream, text, base64, continues, dropped })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i14_only_what_was_given_out_is_a_cursor() {
        let cursor = LogCursor { epoch: 7, seq: u64::MAX };
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
        for text in ["", "-", "7", "7-", "-7", "+7-1", "7-1-1", "7-18446744073709551616", "7 -1", "７-1"] {
            assert_eq!(text.parse::<LogCursor>(), Err(LogCursorError), "{text}");
        }
    }

    #[test]
    fn a_chunk_travels_between_members_and_a_record_says_no_more_than_needed() {
        let entry = LogEntry {
            seq: 3,
            time_ms: 5,
            stream: LogStream::Stderr,
            text: "a\u{fffd}".into(),
            base64: Some("Yf8=".into()),
            continues: false,
            dropped: 0,
        };
        let next = LogCursor { epoch: 9, seq: 3 };
        let chunk = LogChunk { entries: vec![entry.clone()], next, missed: 2, more: true };
        let bytes = postcard::to_stdvec(&chunk).unwrap();
        assert_eq!(postcard::from_bytes::<LogChunk>(&bytes).unwrap(), chunk);
        let json = serde_json::to_string(&entry.into_record(9)).unwrap();
        assert_eq!(
            json,
            r#"{"kind":"line","cursor":"9-3","time_ms":5,"stream":"stderr","text":"a�","base64":"Yf8="}"#
        );
    }
}
