//! Addresses of the overlay: a ULA /48 for the cluster (RFC 4193), a /64 for a node, a /128 for an instance.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::Ipv6Addr;

/// The cluster's /48.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterPrefix([u8; 6]);

/// A node's /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodePrefix([u8; 8]);

impl ClusterPrefix {
    /// A locally assigned ULA prefix: `fd` and 40 bits of `entropy` (RFC 4193 §3.2).
    pub fn from_entropy(entropy: u128) -> Self {
        let e = entropy.to_be_bytes();
        Self([0xfd, e[0], e[1], e[2], e[3], e[4]])
    }

    /// The /64 of the node with this number.
    pub fn node(self, number: u16) -> NodePrefix {
        let [a, b, c, d, e, f] = self.0;
        let [hi, lo] = number.to_be_bytes();
        NodePrefix([a, b, c, d, e, f, hi, lo])
    }
}

impl NodePrefix {
    /// The instance address with this number; number 0 is the subnet-router anycast address and is never given.
    pub fn address(self, number: u64) -> Ipv6Addr {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&self.0);
        bytes[8..].copy_from_slice(&number.to_be_bytes());
        Ipv6Addr::from(bytes)
    }

    /// Whether `address` lies within.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        address.octets()[..8] == self.0
    }
}

impl fmt::Display for NodePrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/64", self.address(0))
    }
}

impl fmt::Display for ClusterPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/48", self.node(0).address(0))
    }
}

macro_rules! prefix_serde {
    ($name:ident, $bytes:literal, $suffix:literal) => {
        // Text for people, bytes in what is stored.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if !d.is_human_readable() {
                    return <[u8; $bytes]>::deserialize(d).map(Self);
                }
                let text = String::deserialize(d)?;
                let fail =
                    || serde::de::Error::custom(concat!("expected an IPv6 prefix that ends in ", $suffix));
                let address: Ipv6Addr =
                    text.strip_suffix($suffix).and_then(|t| t.parse().ok()).ok_or_else(fail)?;
                let octets = address.octets();
                if octets[$bytes..].iter().any(|b| *b != 0) {
                    return Err(fail());
                }
                let mut bytes = [0u8; $bytes];
                bytes.copy_from_slice(&octets[..$bytes]);
                Ok(Self(bytes))
            }
        }
    };
}

prefix_serde!(ClusterPrefix, 6, "/48");
prefix_serde!(NodePrefix, 8, "/64");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_nest_and_do_not_overlap() {
        let cluster = ClusterPrefix::from_entropy(0x0102_0304_0506 << 80);
        assert_eq!(cluster.to_string(), "fd01:203:405::/48");
        let (a, b) = (cluster.node(1), cluster.node(2));
        assert_eq!(a.to_string(), "fd01:203:405:1::/64");
        assert_eq!(a.address(1), "fd01:203:405:1::1".parse::<Ipv6Addr>().unwrap());
        let json = serde_json::to_string(&a).unwrap();
        assert_eq!(json, "\"fd01:203:405:1::/64\"");
        assert_eq!(serde_json::from_str::<NodePrefix>(&json).unwrap(), a);
        assert!(a.contains(a.address(u64::MAX)) && !b.contains(a.address(1)));
    }
}
