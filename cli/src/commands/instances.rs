//! `holdfast instances`: what runs, where, and why it does not.

use crate::args::tenant::Instances;
use crate::failure::Failure;
use crate::output::{age, or_dash, table, word};
use crate::session::Session;
use holdfast_model::resource::Instance;

pub(crate) async fn run(session: &Session, arguments: Instances) -> Result<(), Failure> {
    let env = session.env().await?;
    let instances = session.client.instances(env.id, arguments.all).await?;
    session.output.show(&instances.items, || {
        let header = ["ID", "PROCESS", "STATE", "REASON", "RESTARTS", "NODE", "ADDRESS", "SINCE", "DETAIL"];
        table(header, instances.items.iter().map(row))
    })
}

fn row(instance: &Instance) -> [String; 9] {
    [
        instance.id.to_string(),
        instance.process.to_string(),
        word(&instance.state),
        or_dash(instance.reason.map(|r| word(&r))),
        instance.restarts.to_string(),
        instance.node.to_string(),
        instance.address.to_string(),
        age(instance.changed_at),
        or_dash(instance.detail.clone()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::resource::{InstanceReason, InstanceState};
    use holdfast_model::{AppId, DeploymentId, EnvId, InstanceId, NodeId, OrgId, ReleaseId, Timestamp};

    #[test]
    fn golden_row() {
        let instance = Instance {
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
        };
        assert_eq!(
            row(&instance),
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
    }
}
