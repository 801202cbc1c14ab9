//! The PROXY protocol, version 2 (HAProxy's `proxy-protocol.txt`, revision 2020/03/05): how a backend that asked for
//! it learns the client's address, the hostname and the connection's id.
//!
//! The edge only writes headers, and only its own: whatever a client sends is payload behind ours, never a header
//! that we pass on. The bounded decoder is here to check the encoder and for tools; no listener accepts a header.
//! No input makes it panic or grow (I14).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The longest header that the decoder takes, in bytes; the encoder's are far shorter.
pub const HEADER_BYTES_MAX: usize = 4096;
/// The longest value of the unique-id TLV, in bytes (§2.2.5).
pub const UNIQUE_ID_BYTES_MAX: usize = 128;

// §2.2: "the protocol signature" of 12 bytes; then version and command, family and transport, length: 16 bytes.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const FIXED_BYTES: usize = 16;
// §2.2: "The highest four bits contains the version. [...] it must always be sent as \x2"; the lowest four are the
// command: \x0 LOCAL, \x1 PROXY.
const VERSION_AND_LOCAL: u8 = 0x20;
const VERSION_AND_PROXY: u8 = 0x21;
// §2.2: \x11 is TCP over IPv4, \x21 is TCP over IPv6, \x00 UNSPEC.
const UNSPECIFIED: u8 = 0x00;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
const IPV4_BLOCK_BYTES: usize = 12;
const IPV6_BLOCK_BYTES: usize = 36;
// §2.2: type-length-value: one byte of type, two of length.
const TLV_HEADER_BYTES: usize = 3;
// §2.2.1: PP2_TYPE_AUTHORITY and PP2_TYPE_UNIQUE_ID.
const TYPE_AUTHORITY: u8 = 0x02;
const TYPE_UNIQUE_ID: u8 = 0x05;

/// What a backend is told about a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyHeader {
    /// The client's address and port.
    pub source: SocketAddr,
    /// The address and port of the edge that the client connected to.
    pub destination: SocketAddr,
    /// The hostname that was asked for, as in `server_name` (§2.2.3).
    pub authority: Option<String>,
    /// The connection's id, at most [`UNIQUE_ID_BYTES_MAX`] bytes (§2.2.5).
    pub unique_id: Option<String>,
}

/// What the decoder made of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A prefix of a header.
    NeedMore,
    /// A health check or the like of the proxy itself (§2.2, LOCAL): the connection's own addresses count.
    Local {
        /// Length of the header in bytes; the payload starts behind it.
        length: usize,
    },
    /// A relayed connection.
    Proxy {
        /// What it says.
        header: ProxyHeader,
        /// Length of the header in bytes; the payload starts behind it.
        length: usize,
    },
}

/// Why bytes are not a PROXY header of version 2.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyHeaderError {
    /// Another beginning.
    #[error(
        "The bytes do not begin with the PROXY v2 signature; let the sender use PROXY protocol version 2."
    )]
    Signature,
    /// An unknown version or command.
    #[error("The version and command {0:#04x} are neither LOCAL nor PROXY of version 2; fix the sender.")]
    Command(u8),
    /// Another family or transport than TCP over IPv4 or IPv6.
    #[error("The family and transport {0:#04x} are not TCP over IPv4 or IPv6; relay only TCP.")]
    Family(u8),
    /// A header over [`HEADER_BYTES_MAX`].
    #[error("The header has {0} bytes, and at most 4096 are taken; send fewer TLVs.")]
    TooLong(usize),
    /// Addresses or a TLV end behind the header's end.
    #[error("The header ends inside its {0}; fix the sender.")]
    Truncated(&'static str),
    /// A TLV with a value that is not allowed.
    #[error("The {0} TLV is too long, not UTF-8 or there twice; fix the sender.")]
    Tlv(&'static str),
}

impl ProxyHeader {
    /// The header's bytes, to be sent before anything else.
    ///
    /// A unique id over [`UNIQUE_ID_BYTES_MAX`] or an authority over 255 bytes (no hostname is that long) is left out.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(128);
        let family = self.encode_addresses(&mut block);
        if let Some(authority) = self.authority.as_ref().filter(|a| a.len() <= usize::from(u8::MAX)) {
            encode_tlv(&mut block, TYPE_AUTHORITY, authority);
        }
        if let Some(id) = self.unique_id.as_ref().filter(|i| i.len() <= UNIQUE_ID_BYTES_MAX) {
            encode_tlv(&mut block, TYPE_UNIQUE_ID, id);
        }
        let mut header = Vec::with_capacity(FIXED_BYTES + block.len());
        header.extend_from_slice(&SIGNATURE);
        header.extend_from_slice(&[VERSION_AND_PROXY, family]);
        // §2.2: "the number of following bytes part of the header in network endian order". At most 36 + 258 + 131.
        header.extend_from_slice(&(block.len() as u16).to_be_bytes());
        header.extend_from_slice(&block);
        header
    }

    /// §2.2: source address, destination address, source port, destination port, in network order.
    fn encode_addresses(&self, block: &mut Vec<u8>) -> u8 {
        let family = match (self.source.ip().to_canonical(), self.destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                block.extend_from_slice(&source.octets());
                block.extend_from_slice(&destination.octets());
                TCP_OVER_IPV4
            }
            (source, destination) => {
                block.extend_from_slice(&ipv6(source).octets());
                block.extend_from_slice(&ipv6(destination).octets());
                TCP_OVER_IPV6
            }
        };
        block.extend_from_slice(&self.source.port().to_be_bytes());
        block.extend_from_slice(&self.destination.port().to_be_bytes());
        family
    }
}

fn ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn encode_tlv(block: &mut Vec<u8>, kind: u8, value: &str) {
    block.push(kind);
    // Callers bound the value to 255 bytes.
    block.extend_from_slice(&(value.len() as u16).to_be_bytes());
    block.extend_from_slice(value.as_bytes());
}

/// Reads a header from the beginning of `bytes`.
///
/// # Errors
/// [`ProxyHeaderError`] when no continuation makes the bytes a header of version 2 for TCP.
pub fn decode(bytes: &[u8]) -> Result<Decoded, ProxyHeaderError> {
    let compared = bytes.len().min(SIGNATURE.len());
    if bytes[..compared] != SIGNATURE[..compared] {
        return Err(ProxyHeaderError::Signature);
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_BYTES>() else { return Ok(Decoded::NeedMore) };
    let (command, family) = (fixed[12], fixed[13]);
    let block_bytes = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    let length = FIXED_BYTES + block_bytes;
    if !matches!(command, VERSION_AND_LOCAL | VERSION_AND_PROXY) {
        return Err(ProxyHeaderError::Command(command));
    }
    if length > HEADER_BYTES_MAX {
        return Err(ProxyHeaderError::TooLong(length));
    }
    let Some(block) = rest.get(..block_bytes) else { return Ok(Decoded::NeedMore) };
    // §2.2: LOCAL: "The receiver must accept this connection as valid and must use the real connection endpoints
    // and discard the protocol block including the family which is ignored."; UNSPEC alike.
    if command == VERSION_AND_LOCAL || family == UNSPECIFIED {
        return Ok(Decoded::Local { length });
    }
    let (source, destination, tlvs) = decode_addresses(family, block)?;
    let mut header = ProxyHeader { source, destination, authority: None, unique_id: None };
    decode_tlvs(tlvs, &mut header)?;
    Ok(Decoded::Proxy { header, length })
}

fn decode_addresses(family: u8, block: &[u8]) -> Result<(SocketAddr, SocketAddr, &[u8]), ProxyHeaderError> {
    let truncated = ProxyHeaderError::Truncated("addresses");
    let (source, destination, ports, tlvs) = match family {
        TCP_OVER_IPV4 => {
            let (b, tlvs) = block.split_first_chunk::<IPV4_BLOCK_BYTES>().ok_or(truncated)?;
            let source = Ipv4Addr::new(b[0], b[1], b[2], b[3]);
            let destination = Ipv4Addr::new(b[4], b[5], b[6], b[7]);
            (IpAddr::V4(source), IpAddr::V4(destination), [b[8], b[9], b[10], b[11]], tlvs)
        }
        TCP_OVER_IPV6 => {
            let (b, tlvs) = block.split_first_chunk::<IPV6_BLOCK_BYTES>().ok_or(truncated.clone())?;
            let (source, rest) = b.split_first_chunk::<16>().ok_or(truncated.clone())?;
            let (destination, rest) = rest.split_first_chunk::<16>().ok_or(truncated)?;
            let ports = [rest[0], rest[1], rest[2], rest[3]];
            (IpAddr::V6(Ipv6Addr::from(*source)), IpAddr::V6(Ipv6Addr::from(*destination)), ports, tlvs)
        }
        other => return Err(ProxyHeaderError::Family(other)),
    };
    let source = SocketAddr::new(source, u16::from_be_bytes([ports[0], ports[1]]));
    let destination = SocketAddr::new(destination, u16::from_be_bytes([ports[2], ports[3]]));
    Ok((source, destination, tlvs))
}

/// §2.2: "a receiver may skip" the TLVs that it does not know.
fn decode_tlvs(mut tlvs: &[u8], header: &mut ProxyHeader) -> Result<(), ProxyHeaderError> {
    while !tlvs.is_empty() {
        let (tlv, rest) =
            tlvs.split_first_chunk::<TLV_HEADER_BYTES>().ok_or(ProxyHeaderError::Truncated("TLVs"))?;
        let length = usize::from(u16::from_be_bytes([tlv[1], tlv[2]]));
        let (value, rest) = rest.split_at_checked(length).ok_or(ProxyHeaderError::Truncated("TLVs"))?;
        tlvs = rest;
        match tlv[0] {
            TYPE_AUTHORITY => set_once(&mut header.authority, value, usize::from(u8::MAX), "authority")?,
            TYPE_UNIQUE_ID => set_once(&mut header.unique_id, value, UNIQUE_ID_BYTES_MAX, "unique-id")?,
            _ => {}
        }
    }
    Ok(())
}

fn set_once(
    slot: &mut Option<String>,
    value: &[u8],
    bytes_max: usize,
    what: &'static str,
) -> Result<(), ProxyHeaderError> {
    let text =
        str::from_utf8(value).ok().filter(|t| t.len() <= bytes_max).ok_or(ProxyHeaderError::Tlv(what))?;
    match slot.replace(text.to_owned()) {
        None => Ok(()),
        Some(_) => Err(ProxyHeaderError::Tlv(what)),
    }
}

/// Entry for a fuzz target: any bytes are answered, and what was understood survives being written again.
///
/// # Panics
/// When it does not: that is what the fuzzer looks for.
pub fn fuzz_proxy_header(bytes: &[u8]) {
    let Ok(Decoded::Proxy { header, length }) = decode(bytes) else { return };
    assert!(length <= bytes.len(), "the header is longer than what was read");
    let written = header.encode();
    let Ok(Decoded::Proxy { header: again, length }) = decode(&written) else {
        panic!("the encoder wrote what the decoder refuses")
    };
    assert_eq!(length, written.len(), "the encoder wrote another length");
    // IPv4 addresses mapped into IPv6 are written as what they are.
    let canonical = |address: SocketAddr| (address.ip().to_canonical(), address.port());
    assert_eq!(canonical(again.source), canonical(header.source), "the source changed");
    assert_eq!(canonical(again.destination), canonical(header.destination), "the destination changed");
    assert_eq!((again.authority, again.unique_id), (header.authority, header.unique_id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(source: &str, destination: &str) -> ProxyHeader {
        ProxyHeader {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            authority: Some("app.example".into()),
            unique_id: Some("01JZ0000000000000000000000".into()),
        }
    }

    #[test]
    fn ipv4_header_has_the_bytes_of_the_specification() {
        let bytes = header("192.0.2.1:4660", "198.51.100.2:443").encode();
        let mut want = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
        want.extend_from_slice(&[0, 12 + 3 + 11 + 3 + 26]);
        want.extend_from_slice(&[192, 0, 2, 1, 198, 51, 100, 2, 0x12, 0x34, 0x01, 0xbb]);
        want.extend_from_slice(b"\x02\x00\x0bapp.example");
        want.extend_from_slice(b"\x05\x00\x1a01JZ0000000000000000000000");
        assert_eq!(bytes, want);
    }

    #[test]
    fn mapped_addresses_are_written_as_ipv4_and_mixed_ones_as_ipv6() {
        assert_eq!(header("[::ffff:192.0.2.1]:1", "[::ffff:198.51.100.2]:2").encode()[13], TCP_OVER_IPV4);
        let mixed = header("192.0.2.1:1", "[2001:db8::1]:2").encode();
        let Ok(Decoded::Proxy { header, .. }) = decode(&mixed) else { panic!("{mixed:?}") };
        assert_eq!(header.source, "[::ffff:192.0.2.1]:1".parse().unwrap());
    }

    #[test]
    fn i14_bad_headers_are_refused_with_their_own_error() {
        let good = header("[2001:db8::1]:1", "[2001:db8::2]:2").encode();
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            decode(&bad)
        };
        assert_eq!(with(3, 0), Err(ProxyHeaderError::Signature));
        assert_eq!(with(12, 0x11), Err(ProxyHeaderError::Command(0x11)));
        assert_eq!(with(13, 0x12), Err(ProxyHeaderError::Family(0x12)));
        assert_eq!(with(14, 0xff), Err(ProxyHeaderError::TooLong(0xff00 + usize::from(good[15]) + 16)));
        assert_eq!(with(15, 20), Err(ProxyHeaderError::Truncated("addresses")));
        assert_eq!(with(15, 38), Err(ProxyHeaderError::Truncated("TLVs")));
        assert_eq!(with(55, 0xff), Err(ProxyHeaderError::Tlv("authority")));
        assert!(matches!(with(12, VERSION_AND_LOCAL), Ok(Decoded::Local { .. })));
    }

    proptest! {
        #[test]
        fn a_written_header_is_read_back(
            source: [u8; 16], destination: [u8; 16], ports: (u16, u16), v4: bool,
            authority in proptest::option::of("[a-z.]{1,253}"), unique_id in proptest::option::of("[0-9A-Z]{26}"),
            payload: Vec<u8>, cut: prop::sample::Index,
        ) {
            let ip = |o: [u8; 16]| if v4 {
                IpAddr::V4(Ipv4Addr::new(o[0], o[1], o[2], o[3]))
            } else {
                IpAddr::V6(Ipv6Addr::from(o)).to_canonical()
            };
            let (source, destination) = (ip(source), ip(destination));
            prop_assume!(source.is_ipv4() == destination.is_ipv4());
            let header = ProxyHeader {
                source: SocketAddr::new(source, ports.0), destination: SocketAddr::new(destination, ports.1),
                authority, unique_id,
            };
            let mut bytes = header.encode();
            let length = bytes.len();
            prop_assert_eq!(decode(&bytes[..cut.index(length)]), Ok(Decoded::NeedMore));
            bytes.extend_from_slice(&payload);
            prop_assert_eq!(decode(&bytes), Ok(Decoded::Proxy { header, length }));
        }

        #[test]
        fn i14_any_bytes_are_answered(mut bytes: Vec<u8>, keep in 0..16_usize) {
            fuzz_proxy_header(&bytes);
            bytes.splice(..bytes.len().min(keep), header("192.0.2.1:1", "192.0.2.2:2").encode()[..keep].iter().copied());
            fuzz_proxy_header(&bytes);
        }
    }
}
