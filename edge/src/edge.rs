//! The state that every part of the data path shares: the table in force, the gate, the balancer, the counters.
//!
//! The table is the only thing here that is ever replaced, and it is replaced whole (I8).

use crate::EdgeConfig;
use crate::admission::Admission;
use crate::balance::Balancer;
use crate::config::{Limits, fit_connections};
use crate::metrics::Metrics;
use crate::pipe::PipePool;
use crate::relay::Relay;
use crate::table::{Table, TableError};
use arc_swap::{ArcSwap, Guard};
use holdfast_model::agent::EdgeRoute;
use std::net::IpAddr;
use std::sync::Arc;

/// An edge's shared state.
#[derive(Debug)]
pub struct Edge {
    table: ArcSwap<Table>,
    pub(crate) listen: Vec<IpAddr>,
    pub(crate) limits: Limits,
    pub(crate) admission: Arc<Admission>,
    pub(crate) balancer: Balancer,
    pub(crate) relay: Relay,
    pub(crate) metrics: Metrics,
}

impl Edge {
    /// An edge with an empty table, which serves nothing.
    pub fn new(config: &EdgeConfig) -> Arc<Self> {
        let limits = config.limits.clone();
        let connections = fit_connections(limits.connections);
        let seed = config.seed.unwrap_or_else(rand::random);
        tracing::info!(connections, seed, "edge is ready");
        Arc::new(Self {
            table: ArcSwap::default(),
            listen: config.listen.clone(),
            admission: Admission::new(connections, limits.connections_per_source, limits.hello_memory_bytes),
            balancer: Balancer::new(seed),
            relay: Relay {
                idle: limits.idle,
                idle_half_closed: limits.idle_half_closed,
                zero_copy: config.zero_copy,
                pipes: PipePool::default(),
            },
            metrics: Metrics::default(),
            limits,
        })
    }

    /// The table in force. Whoever decides something by it takes it once and keeps it for that decision.
    pub fn table(&self) -> Guard<Arc<Table>> {
        self.table.load()
    }

    /// Puts the table of `routes` in force. Not to be called twice at the same time: the second would build on a table
    /// that the first replaces.
    ///
    /// # Errors
    /// [`TableError`] when the routes contradict themselves; the table in force stays.
    pub fn apply<'a>(&self, routes: impl IntoIterator<Item = &'a EdgeRoute>) -> Result<(), TableError> {
        let built = Table::build(routes, &self.table.load())
            .inspect_err(|_| self.metrics.tables_refused.increment())?;
        self.table.store(Arc::new(built));
        self.metrics.tables_applied.increment();
        Ok(())
    }

    /// The counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Client connections that are open.
    pub fn connections(&self) -> usize {
        self.admission.connections()
    }
}
