//! What the benchmarks share: states with a long history, made by the product's own state machine.

pub mod history;
