//! PROXY v2 headers between our codec and two that others wrote, both ways, on generated headers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use holdfast_edge::proxy_protocol::{Decoded, ProxyHeader, decode};
use proptest::prelude::*;
use proxy_header::{ParseConfig, ProxiedAddress, Tlv};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};

const AUTHORITY: u8 = 0x02;
const UNIQUE_ID: u8 = 0x05;

/// TLVs that we do not know and have to skip; `PP2_TYPE_NOOP` and three kinds for applications (§2.2.7).
const SKIPPED: &[u8] = &[0x04, 0xe0, 0xe7, 0xef];

fn addresses() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    let v4 = || any::<SocketAddrV4>().prop_map(SocketAddr::V4);
    // A header has no place for a flow or a scope. We write addresses mapped into IPv6 as what they are.
    let v6 = || {
        any::<SocketAddrV6>()
            .prop_map(|a| SocketAddr::new(IpAddr::V6(*a.ip()), a.port()))
            .prop_filter("mapped", |a| a.ip().to_canonical().is_ipv6())
    };
    prop_oneof![(v4(), v4()), (v6(), v6())]
}

prop_compose! {
    fn headers()(
        (source, destination) in addresses(),
        authority in proptest::option::of("[a-z0-9.-]{1,255}"),
        unique_id in proptest::option::of("[ -~]{1,128}"),
    ) -> ProxyHeader {
        ProxyHeader { source, destination, authority, unique_id }
    }
}

/// Others' TLVs, each put in front of ours.
fn skipped() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    prop::collection::vec((prop::sample::select(SKIPPED), prop::collection::vec(any::<u8>(), 0..100)), 0..4)
}

fn parse_by_proxy_header(
    bytes: &[u8],
) -> Result<(proxy_header::ProxyHeader<'_>, usize), proxy_header::Error> {
    let config = ParseConfig { include_tlvs: true, allow_v1: false, allow_v2: true };
    proxy_header::ProxyHeader::parse(bytes, config)
}

fn ends_by_ppp(header: &ppp::v2::Header<'_>) -> Option<(SocketAddr, SocketAddr)> {
    match header.addresses {
        ppp::v2::Addresses::IPv4(a) => Some((
            (a.source_address, a.source_port).into(),
            (a.destination_address, a.destination_port).into(),
        )),
        ppp::v2::Addresses::IPv6(a) => Some((
            (a.source_address, a.source_port).into(),
            (a.destination_address, a.destination_port).into(),
        )),
        _ => None,
    }
}

proptest! {
    #[test]
    fn two_other_parsers_read_what_we_write(header in headers(), payload: Vec<u8>) {
        let mut bytes = header.encode();
        let length = bytes.len();
        bytes.extend_from_slice(&payload);

        let read = ppp::v2::Header::try_from(bytes.as_slice()).unwrap();
        prop_assert_eq!((read.version, read.command), (ppp::v2::Version::Two, ppp::v2::Command::Proxy));
        prop_assert_eq!(read.protocol, ppp::v2::Protocol::Stream);
        prop_assert_eq!(ends_by_ppp(&read), Some((header.source, header.destination)));
        prop_assert_eq!(read.len(), length);
        let tlvs: Vec<(u8, Vec<u8>)> =
            read.tlvs().map(|tlv| tlv.unwrap()).map(|tlv| (tlv.kind, tlv.value.to_vec())).collect();
        let ours = [(AUTHORITY, &header.authority), (UNIQUE_ID, &header.unique_id)];
        let want: Vec<(u8, Vec<u8>)> = ours
            .into_iter()
            .filter_map(|(kind, text)| Some((kind, text.clone()?.into_bytes())))
            .collect();
        prop_assert_eq!(tlvs, want);

        let (read, read_length) = parse_by_proxy_header(&bytes).unwrap();
        let ends = read.proxied_address().unwrap();
        prop_assert_eq!(ends.protocol, proxy_header::Protocol::Stream);
        prop_assert_eq!((ends.source, ends.destination), (header.source, header.destination));
        prop_assert_eq!(read_length, length);
        prop_assert_eq!(read.authority(), header.authority.as_deref());
        prop_assert_eq!(read.unique_id(), header.unique_id.as_deref().map(str::as_bytes));
    }

    #[test]
    fn we_read_what_two_others_write(header in headers(), skipped in skipped()) {
        let mut builder = ppp::v2::Builder::with_addresses(
            ppp::v2::Version::Two | ppp::v2::Command::Proxy,
            ppp::v2::Protocol::Stream,
            (header.source, header.destination),
        );
        let mut tlvs: Vec<Tlv<'_>> = Vec::new();
        for (kind, value) in &skipped {
            builder = builder.write_tlv(*kind, value).unwrap();
            tlvs.push(Tlv::Custom(*kind, value.as_slice().into()));
        }
        if let Some(authority) = &header.authority {
            builder = builder.write_tlv(AUTHORITY, authority.as_bytes()).unwrap();
            tlvs.push(Tlv::Authority(authority.into()));
        }
        if let Some(id) = &header.unique_id {
            builder = builder.write_tlv(UNIQUE_ID, id.as_bytes()).unwrap();
            tlvs.push(Tlv::UniqueId(id.as_bytes().into()));
        }
        let ends = ProxiedAddress::stream(header.source, header.destination);
        let mut by_proxy_header = Vec::new();
        proxy_header::ProxyHeader::with_tlvs(Some(ends), tlvs).encode_v2(&mut by_proxy_header).unwrap();
        for bytes in [builder.build().unwrap(), by_proxy_header] {
            let length = bytes.len();
            prop_assert_eq!(decode(&bytes), Ok(Decoded::Proxy { header: header.clone(), length }));
        }
    }

    /// One byte of a header is another: whoever takes it must take it for the same ends and the same length.
    #[test]
    fn a_damaged_header_is_never_read_as_other_ends_than_others_read(
        header in headers(), at: prop::sample::Index, byte: u8,
    ) {
        let mut bytes = header.encode();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let Ok(Decoded::Proxy { header: ours, length }) = decode(&bytes) else { return Ok(()) };
        let (theirs, their_length) = parse_by_proxy_header(&bytes).unwrap();
        let ends = theirs.proxied_address().unwrap();
        prop_assert_eq!((ends.source, ends.destination, their_length), (ours.source, ours.destination, length));
        let theirs = ppp::v2::Header::try_from(bytes.as_slice()).unwrap();
        prop_assert_eq!(ends_by_ppp(&theirs), Some((ours.source, ours.destination)));
        prop_assert_eq!(theirs.len(), length);
    }
}

#[test]
fn what_two_others_write_about_themselves_is_local() {
    let local = ppp::v2::Builder::new(
        ppp::v2::Version::Two | ppp::v2::Command::Local,
        ppp::v2::AddressFamily::Unspecified | ppp::v2::Protocol::Unspecified,
    );
    // §2.2: the addresses of a LOCAL header are there to be ignored.
    let ends: (SocketAddr, SocketAddr) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
    let addressed = ppp::v2::Builder::with_addresses(
        ppp::v2::Version::Two | ppp::v2::Command::Local,
        ppp::v2::Protocol::Stream,
        ends,
    );
    let mut by_proxy_header = Vec::new();
    proxy_header::ProxyHeader::with_local().encode_v2(&mut by_proxy_header).unwrap();
    for bytes in [local.build().unwrap(), addressed.build().unwrap(), by_proxy_header] {
        assert_eq!(decode(&bytes), Ok(Decoded::Local { length: bytes.len() }));
    }
}
