//! Counters of the data path, as plain atomics; the status shows them, and later a scrape.
//!
//! Nothing here identifies a client. Counters only rise and wrap at 2^64.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[$doc])* pub $name: Counter,)*
        }

        /// The counters' values at one moment (not one instant: they are read one after the other).
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct MetricsSnapshot {
            $($(#[$doc])* #[serde(default)] pub $name: u64,)*
        }

        impl Metrics {
            /// Reads every counter.
            pub fn snapshot(&self) -> MetricsSnapshot {
                MetricsSnapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Connections accepted.
    accepted,
    /// Connections closed at once because the edge has all that it may.
    shed_total,
    /// Connections closed at once because their source has all that it may.
    shed_source,
    /// Connections closed because the memory for unfinished hellos was used up.
    shed_hello_memory,
    /// Accepts that failed.
    accept_errors,
    /// Connections closed because they sent no valid ClientHello.
    hello_refused,
    /// Connections closed because the hello took too long.
    hello_timed_out,
    /// Connections that their client closed before the hello was complete.
    hello_abandoned,
    /// Connections closed because the hello names no host.
    no_server_name,
    /// Connections closed because no route has the name.
    no_route,
    /// Connections closed because the route has no backend.
    no_backend,
    /// Connections closed because no backend accepted.
    connect_failed,
    /// Single attempts to connect to a backend that failed.
    connect_attempts_failed,
    /// Times that a backend left rotation.
    backends_left_rotation,
    /// Times that a backend came back into rotation.
    backends_back_in_rotation,
    /// Probes sent.
    probes,
    /// Connections that were relayed to their end.
    relayed,
    /// Relayed connections that ended with a reset.
    relayed_reset,
    /// Relayed connections closed because they were idle.
    relayed_idle,
    /// Bytes from clients to backends, with the PROXY headers before them.
    bytes_to_backends,
    /// Bytes from backends to clients.
    bytes_to_clients,
    /// Bytes of both that were spliced and not copied.
    bytes_spliced,
    /// Table switches.
    tables_applied,
    /// Updates refused because they contradict themselves.
    tables_refused,
}
