//! `holdfast volume snapshot`, `snapshots`, `restore` and `delete-snapshot`: what is kept of volumes, and volumes that are
//! made from it.

use crate::args::tenant::Wait;
use crate::commands::watch::{Progress, watch};
use crate::failure::Failure;
use crate::output::{age, table};
use crate::session::Session;
use crate::terminal::harmless;
use holdfast_client::exit;
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{SnapshotCause, SnapshotState, VolumeSnapshot};
use holdfast_model::{SnapshotId, VolumeName};
use std::time::Instant;

/// Takes a snapshot of a volume, and watches it to its end if that was asked.
pub(crate) async fn create(session: &Session, volume: &Volume, wait: Wait) -> Result<(), Failure> {
    let asked = session.client.create_snapshot(volume.id).await?.item;
    if wait.no_wait {
        return session
            .output
            .show(&asked, || format!("Snapshot {} of volume {} is under way.", asked.id, asked.name));
    }
    let what = format!("Snapshot {}", asked.id);
    let look = async |progress: &mut Progress| {
        let seen = session.client.volume_snapshot(asked.id).await?.item;
        if !seen.state.is_under_way() {
            return Ok(Some(seen));
        }
        progress.say(&format!("{what}: {}", state(&seen)), "");
        Ok(None)
    };
    let ended = watch(session, &what, wait.wait_timeout, look).await?;
    match &ended.state {
        SnapshotState::Failed { detail } => {
            Err(Failure::Backup(format!("Snapshot {} came to nothing: {}", ended.id, harmless(detail))))
        }
        _ => session.output.show(&ended, || {
            let took = ended.changed_at.since(ended.created_at);
            format!(
                "Snapshot {} of volume {} is in the store of backups after {:.1} s: {}.",
                ended.id,
                ended.name,
                took as f64 / 1_000.0,
                state(&ended)
            )
        }),
    }
}

/// Lists the snapshots of an env's volumes, or of one.
pub(crate) async fn list(session: &Session, volume: Option<&str>) -> Result<(), Failure> {
    let env = session.env().await?;
    let mut snapshots = session.client.volume_snapshots(env.id).await?.items;
    if let Some(named) = volume {
        snapshots.retain(|snapshot| snapshot.name.as_str() == named || snapshot.volume.to_string() == named);
    }
    session.output.show(&snapshots, || {
        let rows = snapshots.iter().map(|snapshot| {
            [
                snapshot.id.to_string(),
                snapshot.name.to_string(),
                match snapshot.cause {
                    SnapshotCause::Asked => "asked".to_owned(),
                    SnapshotCause::Daily => "daily".to_owned(),
                },
                state(snapshot),
                age(snapshot.created_at),
            ]
        });
        table(["ID", "VOLUME", "CAUSE", "STATE", "AGE"], rows)
    })
}

/// Makes a volume from a snapshot, and watches it to its end if that was asked.
pub(crate) async fn restore(
    session: &Session,
    snapshot: SnapshotId,
    name: VolumeName,
    wait: Wait,
) -> Result<(), Failure> {
    let made = session.client.restore_snapshot(snapshot, name).await?.item;
    if wait.no_wait {
        return session
            .output
            .show(&made, || format!("Volume {} is being restored as {}.", made.name, made.id));
    }
    let began = Instant::now();
    let what = format!("The restore of volume {}", made.name);
    // What is not being restored any more is whole.
    let look = async |progress: &mut Progress| match session.client.volume_restore(made.id).await {
        Ok(restore) if restore.item.failed.is_none() => {
            progress.say(&format!("{what}: being restored"), "");
            Ok(None)
        }
        Ok(restore) => Ok(Some(restore.item.failed)),
        Err(error) if error.exit_code() == exit::NOT_FOUND => Ok(Some(None)),
        Err(error) => Err(error),
    };
    match watch(session, &what, wait.wait_timeout, look).await? {
        Some(detail) => Err(Failure::Backup(format!(
            "Volume {} could not be restored: {} Delete it, and restore another snapshot.",
            made.name,
            harmless(&detail)
        ))),
        None => {
            let volume = session.client.volume(made.id).await?.item;
            session.output.show(&volume, || {
                let took = began.elapsed().as_secs_f32();
                format!("Volume {} ({}) is restored and verified after {took:.1} s.", volume.name, volume.id)
            })
        }
    }
}

/// Deletes a snapshot.
pub(crate) async fn delete(session: &Session, id: SnapshotId) -> Result<(), Failure> {
    let snapshot = session.client.volume_snapshot(id).await?.item;
    session
        .confirmed(&format!("Delete snapshot {id} of volume {}, and the only key to it?", snapshot.name))?;
    let done = session.client.delete_snapshot(id).await?;
    session.output.show(&done, || format!("Snapshot {id} is deleted."))
}

fn state(snapshot: &VolumeSnapshot) -> String {
    match &snapshot.state {
        SnapshotState::Requested => "requested".to_owned(),
        SnapshotState::Snapshotted => "taken, being uploaded".to_owned(),
        SnapshotState::Uploaded { stored_bytes, .. } => {
            format!("uploaded, {}", indicatif::HumanBytes(*stored_bytes))
        }
        SnapshotState::Failed { detail } => format!("failed: {}", harmless(detail)),
    }
}
