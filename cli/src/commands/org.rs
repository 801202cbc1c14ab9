//! `holdfast org`: who owns apps.

use crate::args::tenant::OrgCommand;
use crate::failure::Failure;
use crate::output::{age, table};
use crate::session::Session;
use holdfast_model::api::CreateOrg;
use holdfast_model::resource::Org;

pub(crate) async fn run(session: &Session, command: OrgCommand) -> Result<(), Failure> {
    match command {
        OrgCommand::Create { name } => {
            let made = session.client.create_org(&CreateOrg { name }).await?;
            session.output.show(&made, || format!("Org {} is made: {}", made.item.name, made.item.id))
        }
        OrgCommand::List => {
            let orgs = session.client.orgs(None).await?;
            session.output.show(&orgs.items, || table(["NAME", "ID", "AGE"], orgs.items.iter().map(row)))
        }
    }
}

fn row(org: &Org) -> [String; 3] {
    [org.name.to_string(), org.id.to_string(), age(org.created_at)]
}
