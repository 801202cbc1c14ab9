//! Where a member's API is reached.

use std::fmt;
use std::str::FromStr;

/// Most endpoints that a client is given.
pub const ENDPOINTS_MAX: usize = 64;

/// Why a text is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an endpoint; give `https://host:port`, or `host:port`, with IPv6 addresses in brackets."
)]
pub struct EndpointError {
    /// The text, cut to a printable length.
    pub text: String,
}

/// Host and port of a member's API. TLS proves who answers there, so the host is an address and nothing more.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    host: String,
    port: u16,
}

impl Endpoint {
    /// The host: a name or an address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Endpoint, EndpointError> {
        let refused = || EndpointError { text: text.chars().take(80).collect() };
        let rest = text.strip_prefix("https://").unwrap_or(text);
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let authority: hyper::http::uri::Authority = rest.parse().map_err(|_| refused())?;
        if rest.contains('@') {
            return Err(refused());
        }
        let port = authority.port_u16().filter(|port| *port != 0).ok_or_else(refused)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(refused());
        }
        Ok(Endpoint { host: host.to_owned(), port })
    }
}

impl From<std::net::SocketAddr> for Endpoint {
    fn from(address: std::net::SocketAddr) -> Endpoint {
        Endpoint { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_and_addresses_are_read() {
        for (text, shown) in [
            ("https://s1.example.com:7443/", "s1.example.com:7443"),
            ("127.0.0.1:7443", "127.0.0.1:7443"),
            ("[::1]:7443", "[::1]:7443"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), shown);
        }
        assert_eq!("[::1]:7443".parse::<Endpoint>().unwrap().host(), "::1");
        for text in ["", "host", "host:0", "host:99999", "http://host:1", "u@host:1", ":7443", "host:1/path"]
        {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn i14_any_text_is_answered(text in "\\PC{0,60}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
            }
        }
    }
}
