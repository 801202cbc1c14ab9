//! Routes for unit tests: ids are drawn from a counter, so that no two are the same.

use holdfast_model::agent::{Backend, EdgeRoute, ProxyProtocol};
use holdfast_model::{InstanceId, RouteId};
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicU64, Ordering};

static NEXT: AtomicU64 = AtomicU64::new(1);

pub(crate) fn backend(port: u16) -> Backend {
    let instance = InstanceId::from_bits(u128::from(port));
    Backend { instance, address: Ipv6Addr::LOCALHOST, port, draining: false }
}

pub(crate) fn route(hostname: &str, listen_port: u16, backends: Vec<Backend>) -> EdgeRoute {
    EdgeRoute {
        id: RouteId::from_bits(u128::from(NEXT.fetch_add(1, Ordering::Relaxed))),
        hostname: Some(hostname.parse().unwrap()),
        listen_port,
        proxy_protocol: ProxyProtocol::Off,
        backends,
    }
}
