//! `holdfast deployments`: roll-outs, newest first.

use crate::args::tenant::Listing;
use crate::failure::Failure;
use crate::output::{age, or_dash, table, word};
use crate::session::Session;
use holdfast_model::resource::Deployment;

pub(crate) async fn run(session: &Session, arguments: Listing) -> Result<(), Failure> {
    let env = session.env().await?;
    let mut deployments = session.client.deployments(env.id).await?.items;
    deployments.reverse();
    deployments.truncate(arguments.limit);
    session.output.show(&deployments, || {
        let header = ["NUMBER", "STATE", "CAUSE", "COUNTS", "BLOCKED", "FAILURE", "RELEASE", "ID", "AGE"];
        table(header, deployments.iter().map(row))
    })
}

fn row(deployment: &Deployment) -> [String; 9] {
    let counts: Vec<_> = deployment.counts.iter().map(|(process, n)| format!("{process}={n}")).collect();
    [
        deployment.number.to_string(),
        word(&deployment.state),
        word(&deployment.cause),
        counts.join(","),
        or_dash(deployment.unschedulable.map(|u| word(&u))),
        or_dash(deployment.failure.map(|f| word(&f))),
        deployment.release.to_string(),
        deployment.id.to_string(),
        age(deployment.created_at),
    ]
}
