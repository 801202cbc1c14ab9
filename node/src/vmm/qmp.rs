//! The little of QEMU's machine protocol that is used: what state the guest is in.
//!
//! Each question is its own short connection, because QEMU serves one client at a time and a restarted agent must
//! not wait for a dead one's.

use std::{path::Path, time::Duration};

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use super::VmmError;

/// How long QEMU may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// The most bytes that are read in one exchange.
const EXCHANGE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "return")]
    answer: Option<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    status: Option<String>,
}

/// The guest's run state, in QEMU's words: `running`, `internal-error`, `paused`…
pub(crate) async fn query_status(path: &Path) -> Result<String, VmmError> {
    match tokio::time::timeout(ANSWER_DEADLINE, exchange(path)).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(source)) => Err(VmmError::Control { path: path.to_owned(), action: "asked", source }),
        Err(_) => Err(VmmError::ControlDeadline {
            path: path.to_owned(),
            expected: "tell the guest's state",
            seconds: ANSWER_DEADLINE.as_secs(),
        }),
    }
}

async fn exchange(path: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\"}\n").await?;
    let mut lines = BufReader::new(stream.take(EXCHANGE_BYTES_MAX)).lines();
    // Greeting, empty answer and events may come before; the exchange as a whole is bounded by bytes and time.
    while let Some(text) = lines.next_line().await? {
        let line: Line = serde_json::from_str(&text)?;
        if let Some(status) = line.answer.and_then(|answer| answer.status) {
            return Ok(status);
        }
    }
    Err(std::io::ErrorKind::UnexpectedEof.into())
}
