//! The ingress agent: routes TLS by SNI and TCP by port to microVMs, with or without a control plane.
