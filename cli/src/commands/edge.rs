//! `holdfast edge`: the cluster's hosts that route public traffic, as an operator sees them. The agent itself is in
//! `agents`.

use crate::commands::status;
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::api::EdgeStatus;

pub(crate) async fn list(session: &Session) -> Result<(), Failure> {
    let edges = session.client.edges().await?.items;
    session.output.show(&edges, || status::edges(&edges))
}

/// The edge with this name or id.
pub(crate) async fn find(session: &Session, named: &str) -> Result<EdgeStatus, Failure> {
    let edges = session.client.edges().await?.items;
    let found = edges.into_iter().find(|s| s.edge.name.as_str() == named || s.edge.id.to_string() == named);
    found.ok_or_else(|| Failure::NotFound { what: "edge", name: named.to_owned() })
}
