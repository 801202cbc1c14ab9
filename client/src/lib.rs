//! The typed HTTP client, and how an agent follows the control plane and keeps what it learnt.
