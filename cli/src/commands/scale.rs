//! `holdfast scale`: another number of instances.

use crate::args::tenant::Scale;
use crate::commands::rollout;
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::api;

pub(crate) async fn run(session: &Session, arguments: Scale) -> Result<(), Failure> {
    let env = session.env().await?;
    let body = api::Scale { counts: arguments.counts.into_iter().collect() };
    let deployment = session.client.scale(env.id, &body).await?.item;
    rollout::finish(session, deployment, arguments.wait).await
}
