//! The receiving side of a snapshot: its parts go to a file one by one, then the whole is checked and installed.
//!
//! Each question may be repeated, because any answer may be lost. Installing outlasts the time that one question has, so it
//! goes on by itself, and whoever asks how it ended is told within [`INSTALL_ANSWER`] that it did not end yet.

use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use openraft::raft::SnapshotResponse;
use openraft::storage::Snapshot;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::disk_work;
use crate::network::chain;
use crate::service::{MemberRaft, unavailable};
use crate::snapshot_file::{Receiving, SnapshotFile, SnapshotFileError, SnapshotFolder};
use crate::transport::message::{Refusal, Response, SnapshotOffer};
use crate::types::{TypeConfig, Vote};

/// How long the answer about an installation is kept back for its end. Well below the time that the sender waits.
const INSTALL_ANSWER: Duration = Duration::from_secs(5);

/// The one snapshot that is on its way to this member.
pub(crate) struct SnapshotReceiver {
    folder: SnapshotFolder,
    state: Mutex<State>,
}

enum State {
    Idle,
    Receiving(Incoming),
    Installing(Installation),
}

struct Incoming {
    offer: SnapshotOffer,
    file: Receiving,
}

/// An installation, under way or ended.
struct Installation {
    digest: [u8; 32],
    vote: Vote,
    result: Shared<BoxFuture<'static, Result<SnapshotResponse<TypeConfig>, Refusal>>>,
}

impl SnapshotReceiver {
    pub(crate) fn new(folder: SnapshotFolder) -> Self {
        Self { folder, state: Mutex::new(State::Idle) }
    }

    /// A snapshot is coming: says which of its bytes are here already.
    pub(crate) async fn begin(&self, offer: SnapshotOffer) -> Result<Response, Refusal> {
        let mut state = self.state.lock().await;
        if let State::Installing(installation) = &*state
            && installation.result.peek().is_none()
        {
            // Its file is still being read, and would go when another one is begun.
            return match installation.digest == offer.digest {
                true => Ok(Response::SnapshotFrom { offset: offer.bytes }),
                false => Err(Refusal::Unavailable("it installs another snapshot".to_owned())),
            };
        }
        // Close the file of an earlier attempt before it is opened again.
        *state = State::Idle;
        let (folder, digest, bytes) = (self.folder.clone(), offer.digest, offer.bytes);
        let file = on_disk(move || folder.receive(digest, bytes)).await?;
        let offset = file.offset();
        tracing::info!(bytes, resumed_at = offset, "receiving a snapshot");
        *state = State::Receiving(Incoming { offer, file });
        Ok(Response::SnapshotFrom { offset })
    }

    /// A part of it.
    pub(crate) async fn chunk(
        &self,
        digest: [u8; 32],
        offset: u64,
        data: Bytes,
    ) -> Result<Response, Refusal> {
        let mut state = self.state.lock().await;
        let mut incoming = take(&mut state, digest)?;
        let (incoming, result) = on_disk(move || {
            let result = incoming.file.write(offset, &data);
            Ok((incoming, result))
        })
        .await?;
        *state = State::Receiving(incoming);
        result.map_err(|error| Refusal::Unavailable(chain(&error)))?;
        Ok(Response::Done)
    }

    /// All of it was sent, by a leader with this vote: checks and installs it. Asked again, says what became of it.
    pub(crate) async fn end(
        &self,
        raft: &MemberRaft,
        digest: [u8; 32],
        vote: Vote,
    ) -> Result<Response, Refusal> {
        let result = self.installation(raft, digest, vote).await?;
        match timeout(INSTALL_ANSWER, result).await {
            Ok(stored) => Ok(Response::SnapshotStored(stored?)),
            Err(_elapsed) => Ok(Response::SnapshotInstalling),
        }
    }

    /// The installation that was asked for, which begins here when it did not yet.
    async fn installation(
        &self,
        raft: &MemberRaft,
        digest: [u8; 32],
        vote: Vote,
    ) -> Result<Shared<BoxFuture<'static, Result<SnapshotResponse<TypeConfig>, Refusal>>>, Refusal> {
        let mut state = self.state.lock().await;
        if let State::Installing(installation) = &*state {
            return match installation.digest == digest && installation.vote == vote {
                true => Ok(installation.result.clone()),
                false => Err(Refusal::Unavailable("it installs another leader's snapshot".to_owned())),
            };
        }
        let incoming = take(&mut state, digest)?;
        // A task of its own: it goes on when nobody waits for it, and a question that is given up does not end it.
        let task = tokio::spawn(install(raft.clone(), incoming, vote));
        let ended = |ended: Result<_, tokio::task::JoinError>| {
            ended.unwrap_or_else(|error| Err(Refusal::Unavailable(error.to_string())))
        };
        let result = task.map(ended).boxed().shared();
        *state = State::Installing(Installation { digest, vote, result: result.clone() });
        Ok(result)
    }
}

async fn install(
    raft: MemberRaft,
    Incoming { offer, file }: Incoming,
    vote: Vote,
) -> Result<SnapshotResponse<TypeConfig>, Refusal> {
    let file: SnapshotFile = on_disk(move || file.finish()).await?;
    if file.meta.snapshot_meta() != offer.meta {
        return Err(Refusal::Invalid("the snapshot covers other entries than were announced".to_owned()));
    }
    let snapshot = Snapshot { meta: offer.meta, snapshot: file };
    raft.install_full_snapshot(vote, snapshot).await.map_err(unavailable)
}

/// What is being received, when it has this digest. It is gone from there until it is put back.
fn take(state: &mut State, digest: [u8; 32]) -> Result<Incoming, Refusal> {
    match std::mem::replace(state, State::Idle) {
        State::Receiving(incoming) if incoming.file.digest() == digest => Ok(incoming),
        other => {
            *state = other;
            Err(Refusal::Unavailable("another snapshot is being received; begin again".to_owned()))
        }
    }
}

async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotFileError> + Send + 'static,
) -> Result<T, Refusal> {
    match disk_work::run(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Refusal::Unavailable(chain(&error))),
        Err(error) => Err(Refusal::Unavailable(error.to_string())),
    }
}
