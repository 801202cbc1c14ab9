//! `holdfast volume`: the disks that an env's deployments have made.

use crate::args::tenant::VolumeCommand;
use crate::commands::volume_snapshot;
use crate::failure::Failure;
use crate::output::{age, or_dash, table};
use crate::session::Session;
use holdfast_model::volume::Volume;

pub(crate) async fn run(session: &Session, command: VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::List => {
            let env = session.env().await?;
            let volumes = session.client.volumes(env.id).await?.items;
            session.output.show(&volumes, || list(&volumes))
        }
        VolumeCommand::Show { volume } => {
            let volume = find(session, &volume).await?;
            session.output.show(&volume, || text(&volume))
        }
        VolumeCommand::Snapshot { volume, wait } => {
            let volume = find(session, &volume).await?;
            volume_snapshot::create(session, &volume, wait).await
        }
        VolumeCommand::Snapshots { volume } => volume_snapshot::list(session, volume.as_deref()).await,
        VolumeCommand::Restore { snapshot, name, wait } => {
            volume_snapshot::restore(session, snapshot, name, wait).await
        }
        VolumeCommand::DeleteSnapshot { snapshot } => volume_snapshot::delete(session, snapshot).await,
        VolumeCommand::Delete { volume } => {
            let volume = find(session, &volume).await?;
            let name = &volume.name;
            session.confirmed(&format!(
                "Delete volume {name} ({} MiB) and all that is on it?",
                volume.size_mib
            ))?;
            let done = session.client.delete_volume(volume.id, volume.version).await?;
            session.output.show(&done, || format!("Volume {name} is deleted."))
        }
    }
}

/// The volume with this id, or with this name in the env.
async fn find(session: &Session, named: &str) -> Result<Volume, Failure> {
    if let Ok(id) = named.parse() {
        return Ok(session.client.volume(id).await?.item);
    }
    let env = session.env().await?;
    let found = session.client.volumes(env.id).await?.items.into_iter().find(|v| v.name.as_str() == named);
    found.ok_or_else(|| Failure::NotFound { what: "volume", name: named.to_owned() })
}

fn list(volumes: &[Volume]) -> String {
    let rows = volumes.iter().map(|volume| {
        [
            volume.name.to_string(),
            format!("{} MiB", volume.size_mib),
            or_dash(volume.home),
            or_dash(volume.attached.map(|attached| attached.instance)),
            volume.id.to_string(),
            age(volume.created_at),
        ]
    });
    table(["NAME", "SIZE", "HOME", "ATTACHED TO", "ID", "AGE"], rows)
}

fn text(volume: &Volume) -> String {
    let home = match volume.home {
        Some(home) => format!("on {home}"),
        None => "on no node yet: it is chosen when an instance first mounts it".to_owned(),
    };
    let attached = match volume.attached {
        Some(attached) => format!("attached to {}", attached.instance),
        None => "attached to no instance".to_owned(),
    };
    let (name, id, size, times) = (&volume.name, volume.id, volume.size_mib, volume.generation);
    format!("Volume {name} ({id}): {size} MiB {home}; {attached}; attached {times} times so far.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::volume::Attachment;
    use holdfast_model::{AppId, EnvId, InstanceId, NodeId, OrgId, Timestamp, VolumeId};

    #[test]
    fn golden_texts() {
        let volume = Volume {
            id: VolumeId::from_bits(1),
            env: EnvId::from_bits(2),
            app: AppId::from_bits(3),
            org: OrgId::from_bits(4),
            name: "data".parse().unwrap(),
            size_mib: 1_024,
            backup: false,
            home: None,
            attached: None,
            generation: 0,
            used: false,
            version: 1,
            created_at: Timestamp(0),
        };
        assert_eq!(
            text(&volume),
            "Volume data (vol_00000000000000000000000001): 1024 MiB on no node yet: it is chosen when an instance \
             first mounts it; attached to no instance; attached 0 times so far."
        );
        let attached = Attachment { instance: InstanceId::from_bits(5), fresh: true };
        let home = Some(NodeId::from_bits(6));
        let volume = Volume { home, attached: Some(attached), generation: 2, ..volume };
        assert_eq!(
            text(&volume),
            "Volume data (vol_00000000000000000000000001): 1024 MiB on node_00000000000000000000000006; attached to \
             inst_00000000000000000000000005; attached 2 times so far."
        );
    }
}
