//! `holdfast confirm`: lets an agent carry out removals that it holds back (I7).

use crate::args::operator::{AgentKind, Confirm};
use crate::commands::{edge, node};
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::Revision;
use holdfast_model::api::{ConfirmRemovals, Contact};

pub(crate) async fn run(session: &Session, arguments: Confirm) -> Result<(), Failure> {
    let name = &arguments.agent;
    let done = match arguments.kind {
        AgentKind::Node => {
            let status = node::find(session, name).await?;
            let through = through(arguments.through, status.contact.as_ref(), name)?;
            session.confirmed(&format!("Let node {name} carry out removals up to revision {through}?"))?;
            session.client.confirm_node(status.node.id, &ConfirmRemovals { through }).await?
        }
        AgentKind::Edge => {
            let status = edge::find(session, name).await?;
            let through = through(arguments.through, status.contact.as_ref(), name)?;
            session.confirmed(&format!("Let edge {name} carry out removals up to revision {through}?"))?;
            session.client.confirm_edge(status.edge.id, &ConfirmRemovals { through }).await?
        }
    };
    session
        .output
        .show(&done, || format!("Confirmed; the agent acts when it hears of revision {}.", done.revision))
}

/// What was named, else what the agent reports that it holds.
fn through(named: Option<Revision>, contact: Option<&Contact>, agent: &str) -> Result<Revision, Failure> {
    named.or_else(|| contact.and_then(|c| c.held).map(|held| held.revision)).ok_or_else(|| {
        Failure::Usage(format!(
            "{agent} reports no update that it holds back; name a revision with --through."
        ))
    })
}
