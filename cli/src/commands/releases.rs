//! `holdfast releases`: what was ever made to run.

use crate::args::tenant::Listing;
use crate::failure::Failure;
use crate::output::{age, table};
use crate::session::Session;
use holdfast_model::resource::Release;

pub(crate) async fn run(session: &Session, arguments: Listing) -> Result<(), Failure> {
    let env = session.env().await?;
    let mut releases = session.client.releases(env.id).await?.items;
    releases.reverse();
    releases.truncate(arguments.limit);
    session.output.show(&releases, || table(["NUMBER", "IMAGE", "ID", "AGE"], releases.iter().map(row)))
}

fn row(release: &Release) -> [String; 4] {
    [release.number.to_string(), release.image.to_string(), release.id.to_string(), age(release.created_at)]
}
