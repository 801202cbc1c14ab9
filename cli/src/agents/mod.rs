//! The agents' roles: joining, running until told to stop, and answering about themselves on their own host.

pub(crate) mod edge;
pub(crate) mod enrolled;
pub(crate) mod node;
pub(crate) mod renewal;
pub(crate) mod shutdown;
