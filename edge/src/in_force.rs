//! Which view is in force: from the replica's views to the table, one whole view after another (I8).
//!
//! A view whose routes contradict each other is refused and the last good table stays. Nothing known changes nothing (I5).

use crate::Edge;
use crate::table::TableError;
use holdfast_client::{Items, Published, View};
use holdfast_model::agent::EdgeRoute;
use std::sync::Arc;

/// Puts views in force, one at a time.
#[derive(Debug)]
pub struct InForce {
    edge: Arc<Edge>,
    /// The items of the table in force.
    items: Option<Items<EdgeRoute>>,
}

/// What became of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// Its table is in force now.
    Switched,
    /// The table in force is the same as before and is right at this view's revision too.
    Same,
    /// Its routes contradict each other: the last good table stays.
    Refused(TableError),
}

impl InForce {
    /// For an edge whose table is empty.
    pub fn new(edge: Arc<Edge>) -> Self {
        Self { edge, items: None }
    }

    /// Puts what is published in force; `None` when nothing is known, which changes nothing.
    pub fn put(&mut self, published: Published<EdgeRoute>) -> Option<(Arc<View<EdgeRoute>>, Put)> {
        let view = published?;
        if self.items.as_ref().is_some_and(|items| Arc::ptr_eq(items, &view.items)) {
            return Some((view, Put::Same));
        }
        let put = match self.edge.apply(view.items.values().map(Arc::as_ref)) {
            Ok(()) => {
                tracing::info!(revision = %view.stamp.revision, routes = view.items.len(), "routes in force");
                self.items = Some(Arc::clone(&view.items));
                Put::Switched
            }
            Err(error) => {
                tracing::error!(revision = %view.stamp.revision, %error, "keeping the last good routes");
                Put::Refused(error)
            }
        };
        Some((view, put))
    }
}
