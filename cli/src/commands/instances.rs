//! `holdfast instances`: what runs, where, and why it does not.

use crate::args::tenant::Instances;
use crate::failure::Failure;
use crate::output::{age, or_dash, table, word};
use crate::session::Session;
use holdfast_model::agent::{ImagePhase, ImageProgress};
use holdfast_model::api::InstanceStatus;
use indicatif::HumanBytes;

pub(crate) async fn run(session: &Session, arguments: Instances) -> Result<(), Failure> {
    let env = session.env().await?;
    let instances = session.client.instances(env.id, arguments.all).await?;
    session.output.show(&instances.items, || {
        let header = ["ID", "PROCESS", "STATE", "REASON", "RESTARTS", "NODE", "ADDRESS", "SINCE", "DETAIL"];
        table(header, instances.items.iter().map(row))
    })
}

fn row(shown: &InstanceStatus) -> [String; 9] {
    let instance = &shown.instance;
    // What holds it up now says more than what did before.
    let detail = shown.image_progress.map(|progress| image(&progress)).or_else(|| instance.detail.clone());
    [
        instance.id.to_string(),
        instance.process.to_string(),
        word(&instance.state),
        or_dash(instance.reason.map(|r| word(&r))),
        instance.restarts.to_string(),
        instance.node.to_string(),
        instance.address.to_string(),
        age(instance.changed_at),
        or_dash(detail),
    ]
}

/// How far an image is, for people.
pub(crate) fn image(progress: &ImageProgress) -> String {
    let ImageProgress { phase, received_bytes, total_bytes, layer, layers } = *progress;
    match phase {
        ImagePhase::Waiting => "image: waits for others".to_owned(),
        ImagePhase::Pulling => {
            let plural = if layers == 1 { "" } else { "s" };
            format!(
                "image: {} of {} in {layers} layer{plural}",
                HumanBytes(received_bytes),
                HumanBytes(total_bytes)
            )
        }
        ImagePhase::Unpacking => format!("image: unpacking layer {layer} of {layers}"),
        ImagePhase::Building => "image: building the root file system".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::resource::{InstanceReason, InstanceState};
    use holdfast_model::{AppId, DeploymentId, EnvId, InstanceId, NodeId, OrgId, ReleaseId, Timestamp};

    fn instance() -> holdfast_model::resource::Instance {
        holdfast_model::resource::Instance {
            id: InstanceId::from_bits(1),
            env: EnvId::from_bits(2),
            app: AppId::from_bits(3),
            org: OrgId::from_bits(4),
            deployment: DeploymentId::from_bits(5),
            release: ReleaseId::from_bits(6),
            process: "web".parse().unwrap(),
            node: NodeId::from_bits(7),
            address: "fd00::1".parse().unwrap(),
            memory_mib: 64,
            cpu_milli: 500,
            state: InstanceState::Failed,
            reason: Some(InstanceReason::ImagePullFailed),
            detail: Some("The registry does not answer.".into()),
            restarts: 3,
            was_ready: false,
            created_at: Timestamp(0),
            changed_at: Timestamp(u64::MAX),
        }
    }

    #[test]
    fn golden_row() {
        let mut shown = InstanceStatus { instance: instance(), image_progress: None };
        assert_eq!(
            row(&shown),
            [
                "inst_00000000000000000000000001",
                "web",
                "failed",
                "image_pull_failed",
                "3",
                "node_00000000000000000000000007",
                "fd00::1",
                "0s",
                "The registry does not answer."
            ]
        );
        shown.image_progress = Some(ImageProgress {
            phase: ImagePhase::Pulling,
            received_bytes: 3 << 19,
            total_bytes: 3 << 20,
            layer: 0,
            layers: 2,
        });
        assert_eq!(row(&shown)[8], "image: 1.50 MiB of 3.00 MiB in 2 layers");
    }

    #[test]
    fn an_older_client_reads_what_a_newer_server_shows_and_the_other_way_round() {
        let shown = InstanceStatus {
            instance: instance(),
            image_progress: Some(ImageProgress {
                phase: ImagePhase::Unpacking,
                received_bytes: 1,
                total_bytes: 1,
                layer: 1,
                layers: 3,
            }),
        };
        let text = serde_json::to_string(&shown).unwrap();
        assert!(text.contains("\"image_progress\":{\"phase\":\"unpacking\""), "{text}");
        assert_eq!(serde_json::from_str::<InstanceStatus>(&text).unwrap(), shown);
        let older: holdfast_model::resource::Instance = serde_json::from_str(&text).unwrap();
        assert_eq!(older, shown.instance);
        let older = serde_json::to_string(&older).unwrap();
        assert_eq!(serde_json::from_str::<InstanceStatus>(&older).unwrap().image_progress, None);
    }
}
