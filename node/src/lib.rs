//! The node agent: keeps the desired microVMs running, with or without a control plane.

pub mod vmm;
