//! The HTTP API, authentication and authorisation, watch streams, agent streams and the Rust client.
