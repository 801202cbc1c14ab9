//! The node agent: keeps the desired microVMs running, with or without a control plane.
//!
//! It follows the control plane, stores what it learns before it acts on it, and compares what it has been told
//! with what it sees: [`reconcile`] decides, [`executor`] acts, [`machine`] watches one microVM each, [`exec`] runs what people ask for in one. A microVM
//! outlives the agent that started it; the next agent adopts it. The agent never reads «cannot reach the control
//! plane» as «you have nothing to do» (I5), never starts again what runs (I7), never opens a port, and treats
//! whatever a guest or a registry sends as hostile (I14).

pub mod admission;
pub mod agent;
pub mod backups;
pub mod boot;
pub mod doctor;
pub mod exec;
pub mod executor;
pub mod health;
pub mod host;
pub mod image;
pub mod logs;
pub mod machine;
pub mod metrics;
pub mod network;
mod pause;
pub mod phase;
mod pulls;
pub mod reconcile;
#[cfg(test)]
mod sample;
pub mod secrets;
pub mod state;
pub mod status;
pub mod step;
pub mod supervisor;
pub mod vmm;
pub mod volumes;
