//! The protocol between a node agent and PID 1 of a microVM, as pure code: frames, messages, and the buffer that
//! holds a workload's output until an agent has it.
//!
//! Nothing here does I/O, reads a clock or allocates more than a named bound. Either peer may be hostile to this
//! code: whatever bytes arrive, decoding answers with an error and never panics (I14). Messages that hold secret
//! material redact it in `Debug` (I10).
//!
//! One conversation is a *session*, opened by the agent with [`message::HostMessage::Sync`]. Every frame of either
//! side carries the session's number, so that what a dead agent left half-written in a pipe is never taken for
//! part of the next conversation.

pub mod config;
pub mod config_parts;
pub mod exec;
pub mod frame;
pub mod lines;
pub mod log_buffer;
pub mod message;

/// The newest version of the protocol that this build speaks. The first byte of every frame is the version in which its
/// message came, so that a peer of an older build understands all that it knows; frames of later versions it refuses.
pub const PROTOCOL_VERSION: u8 = 2;

/// The oldest version that this build speaks.
pub const PROTOCOL_VERSION_OLDEST: u8 = 1;

/// Name of the virtio-serial port that carries the protocol, where the VMM offers virtio-serial.
pub const SERIAL_PORT_NAME: &str = "holdfast.channel";

/// The vsock port on which the guest listens, where the VMM offers vsock.
pub const VSOCK_PORT: u32 = 1024;
