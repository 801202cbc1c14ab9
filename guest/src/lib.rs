//! PID 1 of a microVM and the protocol that it speaks with the node agent.
