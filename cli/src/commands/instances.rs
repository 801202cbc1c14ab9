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
