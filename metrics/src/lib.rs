//! What a process counts, for Prometheus: [`exposition`] makes text of it, [`server`] serves it where the operator says.
//!
//! It never decides what is counted, never holds up what it counts, and never answers more than a scrape: readers, the time
//! of each and the series of an answer are bounded. Values are numbers and labels are names of ours: nothing of a tenant's
//! data, nothing secret (I10).

pub mod exposition;
pub mod server;

pub use exposition::{Exposition, Kind, SERIES_MAX};
pub use server::{Listen, ListenError, Listener, serve};
