//! Tests of the state machine as its callers see it: commands in, outcomes, views and digests out.

mod agents;
mod chain;
mod crashes;
mod durability;
mod exec;
mod golden;
mod history;
mod log_time;
mod members;
mod recent;
mod rollout;
mod rules;
mod secrets;
mod snapshots;
mod versions;
mod volume_snapshots;
mod volumes;
mod world;
