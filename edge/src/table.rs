//! The routing table: which route a port and a hostname lead to, at one revision.
//!
//! A table is built whole from a set of routes or not at all, and never changes afterwards; the edge switches from
//! one to the next by one atomic store, so that no connection sees half an update (I8). A set in which two routes
//! claim the same thing is refused, and the last good table stays: no tie is ever broken here. There is no default
//! route: a port either belongs to one TCP route or looks at names.

use crate::backend::{Backend, BackendKey};
use holdfast_model::agent::{EdgeRoute, ProxyProtocol};
use holdfast_model::{Hostname, RouteId};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A table.
#[derive(Debug, Default)]
pub struct Table {
    ports: HashMap<u16, PortRoutes>,
    backends: HashMap<BackendKey, Arc<Backend>>,
    routes: usize,
}

/// What a port serves.
#[derive(Debug)]
pub enum PortRoutes {
    /// Every connection goes to this route.
    Tcp(Arc<Route>),
    /// The name in the ClientHello decides.
    Tls(HashMap<Hostname, Arc<Route>>),
}

/// A route, ready to be used.
#[derive(Debug)]
pub struct Route {
    /// Its id.
    pub id: RouteId,
    /// Whether backends are told the client's address.
    pub proxy_protocol: ProxyProtocol,
    /// Where it leads.
    pub targets: Vec<Target>,
}

/// A backend as one route uses it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The backend, shared with other routes and tables.
    pub backend: Arc<Backend>,
    /// No new connections, if another target can take them.
    pub draining: bool,
}

/// Why a set of routes makes no table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Two routes with the same hostname on the same port.
    #[error("Routes {first} and {second} both claim {hostname} on port {port}; delete one of them.")]
    HostnameTwice {
        /// The port.
        port: u16,
        /// The name.
        hostname: Hostname,
        /// The one.
        first: RouteId,
        /// The other.
        second: RouteId,
    },
    /// A TCP route on a port that has another route.
    #[error(
        "Routes {first} and {second} both claim port {port}, and one of them takes every connection; delete one."
    )]
    PortTwice {
        /// The port.
        port: u16,
        /// The one.
        first: RouteId,
        /// The other.
        second: RouteId,
    },
    /// A route on port zero.
    #[error("Route {route} listens on port 0, which is no port; delete it and create it with another.")]
    PortZero {
        /// The route.
        route: RouteId,
    },
}

impl Table {
    /// Builds the table of `routes`; backends that `previous` has too keep their counts and their standing.
    ///
    /// # Errors
    /// [`TableError`] names the two routes that contradict each other; nothing was changed.
    pub fn build<'a>(
        routes: impl IntoIterator<Item = &'a EdgeRoute>,
        previous: &Self,
    ) -> Result<Self, TableError> {
        let mut table = Self::default();
        for route in routes {
            table.routes += 1;
            let prepared = Arc::new(Route {
                id: route.id,
                proxy_protocol: route.proxy_protocol,
                targets: table.targets(route, previous),
            });
            table.insert(route, prepared)?;
        }
        Ok(table)
    }

    fn targets(&mut self, route: &EdgeRoute, previous: &Self) -> Vec<Target> {
        let mut targets = Vec::with_capacity(route.backends.len());
        for backend in &route.backends {
            let address = SocketAddr::new(IpAddr::V6(backend.address), backend.port);
            let key = BackendKey { instance: backend.instance, address };
            let shared = self.backends.entry(key).or_insert_with(|| match previous.backends.get(&key) {
                Some(known) => Arc::clone(known),
                None => Arc::new(Backend::new(key)),
            });
            targets.push(Target { backend: Arc::clone(shared), draining: backend.draining });
        }
        targets
    }

    fn insert(&mut self, route: &EdgeRoute, prepared: Arc<Route>) -> Result<(), TableError> {
        let (port, second) = (route.listen_port, route.id);
        if port == 0 {
            return Err(TableError::PortZero { route: second });
        }
        match (self.ports.entry(port), &route.hostname) {
            (Entry::Vacant(free), None) => {
                free.insert(PortRoutes::Tcp(prepared));
            }
            (Entry::Vacant(free), Some(hostname)) => {
                free.insert(PortRoutes::Tls(HashMap::from([(hostname.clone(), prepared)])));
            }
            (Entry::Occupied(taken), None) => {
                return Err(TableError::PortTwice { port, first: taken.get().any_id(second), second });
            }
            (Entry::Occupied(mut taken), Some(hostname)) => match taken.get_mut() {
                PortRoutes::Tcp(first) => {
                    return Err(TableError::PortTwice { port, first: first.id, second });
                }
                PortRoutes::Tls(names) => {
                    if let Some(first) = names.get(hostname) {
                        let (hostname, first) = (hostname.clone(), first.id);
                        return Err(TableError::HostnameTwice { port, hostname, first, second });
                    }
                    names.insert(hostname.clone(), prepared);
                }
            },
        }
        Ok(())
    }

    /// Number of routes.
    pub fn routes(&self) -> usize {
        self.routes
    }

    /// What `port` serves.
    pub fn port(&self, port: u16) -> Option<&PortRoutes> {
        self.ports.get(&port)
    }

    /// The ports that are served.
    pub fn ports(&self) -> impl Iterator<Item = u16> {
        self.ports.keys().copied()
    }

    /// Every backend once.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.backends.values()
    }

    /// Every route with its port and name, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u16, Option<&Hostname>, &Route)> {
        self.ports.iter().flat_map(|(port, routes)| {
            let (tcp, tls) = match routes {
                PortRoutes::Tcp(route) => (Some(route), None),
                PortRoutes::Tls(names) => (None, Some(names)),
            };
            let tcp = tcp.map(|route| (*port, None, route.as_ref()));
            let tls = tls.into_iter().flatten().map(|(name, route)| (*port, Some(name), route.as_ref()));
            tcp.into_iter().chain(tls)
        })
    }
}

impl PortRoutes {
    /// The route that owns `hostname` here; none on a TCP port.
    pub fn by_name(&self, hostname: &Hostname) -> Option<&Arc<Route>> {
        match self {
            Self::Tcp(_) => None,
            Self::Tls(names) => names.get(hostname),
        }
    }

    /// The id of a route here, for an error; `none` never happens, since a port is made with its first route.
    fn any_id(&self, none: RouteId) -> RouteId {
        match self {
            Self::Tcp(route) => route.id,
            Self::Tls(names) => names.values().map(|route| route.id).min().unwrap_or(none),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{backend, route};

    #[test]
    fn i08_a_name_on_a_port_has_one_route_or_the_set_is_refused_whole() {
        let one = route("app.example", 443, vec![backend(1)]);
        let two = route("app.example", 443, vec![backend(2)]);
        let (first, second) = (one.id, two.id);
        let hostname = "app.example".parse().unwrap();
        assert_eq!(
            Table::build(&[one.clone(), two], &Table::default()).unwrap_err(),
            TableError::HostnameTwice { port: 443, hostname, first, second }
        );
        let other_port = route("app.example", 8443, vec![backend(2)]);
        let table = Table::build(&[one, other_port.clone()], &Table::default()).unwrap();
        let found = table.port(8443).unwrap().by_name(&"APP.example.".parse().unwrap()).unwrap();
        assert_eq!((found.id, table.routes(), table.iter().count()), (other_port.id, 2, 2));
    }

    #[test]
    fn i08_a_tcp_route_shares_its_port_with_nobody() {
        let named = route("app.example", 443, vec![backend(1)]);
        let tcp = || EdgeRoute { hostname: None, ..route("x.example", 443, vec![backend(2)]) };
        for routes in [vec![named.clone(), tcp()], vec![tcp(), named], vec![tcp(), tcp()]] {
            let (first, second) = (routes[0].id, routes[1].id);
            let refused = Table::build(&routes, &Table::default()).unwrap_err();
            assert_eq!(refused, TableError::PortTwice { port: 443, first, second });
        }
    }

    #[test]
    fn a_backend_keeps_its_standing_over_a_switch() {
        let old = Table::build(&[route("a.example", 443, vec![backend(1), backend(2)])], &Table::default())
            .unwrap();
        let known = old.backends().find(|b| b.key().address.port() == 1).unwrap();
        known.leave_rotation();
        let new = Table::build(&[route("b.example", 443, vec![backend(1), backend(3)])], &old).unwrap();
        let standing: HashMap<u16, bool> =
            new.backends().map(|b| (b.key().address.port(), b.in_rotation())).collect();
        assert_eq!(standing, HashMap::from([(1, false), (3, true)]));
    }
}
