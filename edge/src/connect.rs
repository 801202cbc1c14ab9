//! Gets a connection to a backend of a route, or to another one when the first does not answer.
//!
//! This happens before any byte is sent, so that trying again repeats nothing. A backend that refuses, or does not
//! answer in time, leaves rotation at once; a fault of this host's own (no descriptors, no ports) is never held
//! against a backend.

use crate::backend::{Backend, Load};
use crate::balance::Balancer;
use crate::metrics::Metrics;
use crate::table::Target;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};

/// Backends that are tried for one connection.
pub const CONNECT_ATTEMPTS_MAX: usize = 3;

/// Why there is no connection to a backend.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The route leads nowhere.
    #[error("The route has no backend; look at its instances.")]
    NoBackend,
    /// None of those that were tried accepted.
    #[error("None of {attempts} backends accepted a connection; look at the route's instances.")]
    NoneAccepted {
        /// How many were tried.
        attempts: usize,
        /// What the last one did.
        #[source]
        last: io::Error,
    },
}

/// Connects to one of `targets`, each attempt bounded by `time_out`.
///
/// # Errors
/// [`ConnectError`] when there is nobody left to try, or [`CONNECT_ATTEMPTS_MAX`] were tried.
pub async fn connect(
    targets: &[Target],
    balancer: &Balancer,
    time_out: Duration,
    metrics: &Metrics,
) -> Result<(TcpStream, Load), ConnectError> {
    let mut tried: Vec<Arc<Backend>> = Vec::new();
    let mut last = None;
    while tried.len() < CONNECT_ATTEMPTS_MAX {
        let Some(load) = balancer.choose(targets, &tried) else { break };
        match dial(load.backend().key().address, time_out).await {
            Ok(stream) => {
                note_answer(load.backend(), metrics);
                return Ok((stream, load));
            }
            Err(error) => {
                metrics.connect_attempts_failed.increment();
                note_failure(load.backend(), &error, metrics);
                last = Some(error);
                tried.push(load.into_backend());
            }
        }
    }
    match last {
        Some(last) => Err(ConnectError::NoneAccepted { attempts: tried.len(), last }),
        None => Err(ConnectError::NoBackend),
    }
}

/// Opens one connection.
///
/// # Errors
/// What the system says, or `TimedOut`.
pub async fn dial(address: SocketAddr, time_out: Duration) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    crate::listeners::keep_alive(&socket)?;
    match tokio::time::timeout(time_out, socket.connect(address)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Notes that a backend accepted.
pub fn note_answer(backend: &Backend, metrics: &Metrics) {
    if backend.return_to_rotation() {
        metrics.backends_back_in_rotation.increment();
        tracing::info!(instance = %backend.key().instance, address = %backend.key().address, "backend is back in rotation");
    }
}

/// Notes that a backend did not accept, if it is the backend that is to blame.
pub fn note_failure(backend: &Backend, error: &io::Error, metrics: &Metrics) {
    if is_the_backends(error) && backend.leave_rotation() {
        metrics.backends_left_rotation.increment();
        tracing::warn!(instance = %backend.key().instance, address = %backend.key().address, %error, "backend left rotation");
        // The next round of probes looks at it.
        backend.probe_at(0);
    }
}

fn is_the_backends(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
    };
    matches!(
        error.kind(),
        ConnectionRefused
            | ConnectionReset
            | ConnectionAborted
            | TimedOut
            | HostUnreachable
            | NetworkUnreachable
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendKey;
    use rustix::io::Errno;

    #[test]
    fn i05_a_fault_of_this_host_is_never_held_against_a_backend() {
        let model = crate::testing::backend(1);
        let backend =
            Backend::new(BackendKey { instance: model.instance, address: (model.address, 1).into() });
        let metrics = Metrics::default();
        for own in [Errno::MFILE, Errno::NFILE, Errno::ADDRNOTAVAIL, Errno::NOBUFS, Errno::NOMEM] {
            note_failure(&backend, &own.into(), &metrics);
            assert!(backend.in_rotation(), "{own:?}");
        }
        for its in [Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::TIMEDOUT, Errno::CONNRESET] {
            note_failure(&backend, &its.into(), &metrics);
            assert!(!backend.in_rotation(), "{its:?}");
            note_answer(&backend, &metrics);
        }
        assert_eq!((metrics.backends_left_rotation.get(), metrics.backends_back_in_rotation.get()), (4, 4));
    }
}
