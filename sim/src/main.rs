//! Whole clusters in one thread from one seed: the real `raft`, `store` and `api`, and the edges'
//! following side, over a simulated network, clock and disks.
//!
//! One process runs one seed, so that nothing of an earlier run (a counter of the standard library or of tokio, a
//! hash's keys) can leak into the next; with `--seeds` it starts itself once per seed. The same seed gives the same
//! trace, byte for byte. What is checked, and what is not simulated, is in `docs/testing/simulation.md`.
//!
//! This crate is no part of the product and nothing depends on it. It checks I1–I8 and I13.

mod api_member;
mod checks;
mod client;
mod client_pool;
mod command_line;
mod deployer;
mod drift;
mod edge_host;
mod edges;
mod errand;
mod fault_plan;
mod happened;
mod history;
mod host;
mod machine;
mod machine_room;
mod making;
mod many_seeds;
mod network;
mod node_checks;
mod node_host;
mod node_link;
mod nodes;
mod pipe;
mod process;
mod run;
mod simulated_host;
mod tally;
mod trace;
mod upgrades;
mod watchers;
mod weather;
mod world;

fn main() -> std::process::ExitCode {
    command_line::main()
}
