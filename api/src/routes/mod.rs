//! The endpoints, a file for each family. [`table`] is the whole API at one glance.

mod agents;
mod apps;
mod cluster;
mod deployments;
mod enrolment;
mod events;
mod exec;
mod instances;
mod logs;
mod members;
mod meta;
mod routing;
mod secrets;
mod tokens;
mod volume_snapshots;
mod volumes;

pub use enrolment::member_subject;

use crate::endpoint::Table;
use crate::service::Service;
use std::sync::Arc;

/// Every endpoint and its handler.
pub(crate) fn table() -> Table<Arc<Service>> {
    let mut table = Table::new();
    meta::add(&mut table);
    apps::add(&mut table);
    deployments::add(&mut table);
    instances::add(&mut table);
    logs::add(&mut table);
    exec::add(&mut table);
    routing::add(&mut table);
    volumes::add(&mut table);
    volume_snapshots::add(&mut table);
    secrets::add(&mut table);
    tokens::add(&mut table);
    events::add(&mut table);
    cluster::add(&mut table);
    members::add(&mut table);
    enrolment::add(&mut table);
    agents::add(&mut table);
    table
}
