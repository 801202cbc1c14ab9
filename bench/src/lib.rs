//! What the benchmarks share: processes and what they cost, and states with a long history.

pub mod error;
pub mod history;
pub mod process;
