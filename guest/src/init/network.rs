//! The guest's network: a static IPv6 address on `eth0`, set by three plain ioctls. No DHCP, no router
//! advertisement, no duplicate address detection: the host gave the address and nobody else has it.

use std::{
    ffi::{c_int, c_short, c_ulong},
    fs, io,
    net::Ipv6Addr,
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use holdfast_guest::config::NetworkConfig;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice::name_to_index, socket_with};

use crate::InitError;

/// How long the kernel may take to find the network card.
const CARD_DEADLINE: Duration = Duration::from_secs(5);

/// Time between two looks for it.
const CARD_POLL: Duration = Duration::from_millis(5);

const CARD: &str = "eth0";

/// Metric of a route that nothing competes with.
const ROUTE_METRIC: u32 = 256;

/// Brings up the loopback interface, and `eth0` if the guest has a network.
pub(crate) fn set_up(network: Option<&NetworkConfig>) -> Result<(), InitError> {
    bring_up("lo")?;
    let Some(network) = network else { return Ok(()) };
    let index = wait_for_card()?;
    for (key, value) in [("accept_ra", "0"), ("autoconf", "0"), ("accept_dad", "0"), ("dad_transmits", "0")] {
        let path = format!("/proc/sys/net/ipv6/conf/{CARD}/{key}");
        fs::write(&path, value).map_err(InitError::at("write", path.clone()))?;
    }
    set_mtu(network.mtu)?;
    bring_up(CARD)?;
    add_address(index, network.address)?;
    add_route(index, network.gateway, 128, None)?;
    add_route(index, Ipv6Addr::UNSPECIFIED, 0, Some(network.gateway))
}

/// Names the guest, for itself and for programs that look their own name up.
pub(crate) fn set_names(hostname: &str, network: Option<&NetworkConfig>) -> Result<(), InitError> {
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|errno| InitError::at("set the host name", hostname)(errno.into()))?;
    fs::create_dir_all("/etc").map_err(InitError::at("create", "/etc"))?;
    let own = network.map_or_else(|| "127.0.1.1".to_owned(), |network| network.address.to_string());
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{own} {hostname}\n");
    fs::write("/etc/hosts", hosts).map_err(InitError::at("write", "/etc/hosts"))?;
    let servers: String =
        network.iter().flat_map(|n| &n.nameservers).map(|server| format!("nameserver {server}\n")).collect();
    if !servers.is_empty() {
        fs::write("/etc/resolv.conf", servers).map_err(InitError::at("write", "/etc/resolv.conf"))?;
    }
    Ok(())
}

fn wait_for_card() -> Result<u32, InitError> {
    let socket = control_socket()?;
    let started_at = Instant::now();
    loop {
        match name_to_index(&socket, CARD) {
            Ok(index) => return Ok(index),
            Err(errno) if started_at.elapsed() > CARD_DEADLINE => {
                return Err(InitError::at("find the network card", CARD)(errno.into()));
            }
            Err(_) => thread::sleep(CARD_POLL),
        }
    }
}

fn control_socket() -> Result<OwnedFd, InitError> {
    socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| InitError::at("open a socket for", "the network")(errno.into()))
}

/// `struct in6_rtmsg` of the kernel's interface, whose fields `libc` keeps to itself.
#[repr(C)]
struct RouteRequest {
    destination: libc::in6_addr,
    source: libc::in6_addr,
    gateway: libc::in6_addr,
    kind: u32,
    destination_prefix: u16,
    source_prefix: u16,
    metric: u32,
    info: c_ulong,
    flags: u32,
    index: c_int,
}

const _: () = assert!(size_of::<RouteRequest>() == size_of::<libc::in6_rtmsg>());

/// A request about an interface, zeroed but for its name.
fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is plain numbers and a union of such; all-zero is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn bring_up(name: &str) -> Result<(), InitError> {
    let mut request = request_for(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as c_short;
    // SAFETY: the request is an `ifreq`, which SIOCSIFFLAGS reads and which outlives the call.
    unsafe { ioctl(libc::SIOCSIFFLAGS, &raw const request) }.map_err(InitError::at("bring up", name))
}

fn set_mtu(mtu: u32) -> Result<(), InitError> {
    let mut request = request_for(CARD);
    request.ifr_ifru.ifru_mtu = c_int::try_from(mtu).unwrap_or(c_int::MAX);
    // SAFETY: the request is an `ifreq`, which SIOCSIFMTU reads and which outlives the call.
    unsafe { ioctl(libc::SIOCSIFMTU, &raw const request) }
        .map_err(InitError::at("set the packet size of", CARD))
}

fn add_address(index: u32, address: Ipv6Addr) -> Result<(), InitError> {
    let request = libc::in6_ifreq {
        ifr6_addr: in6(address),
        ifr6_prefixlen: 128,
        ifr6_ifindex: c_int::try_from(index).unwrap_or(c_int::MAX),
    };
    // SAFETY: on an IPv6 socket SIOCSIFADDR reads an `in6_ifreq`, which outlives the call.
    unsafe { ioctl(libc::SIOCSIFADDR, &raw const request) }
        .map_err(InitError::at("set the address", address.to_string()))
}

fn add_route(
    index: u32,
    destination: Ipv6Addr,
    prefix: u16,
    gateway: Option<Ipv6Addr>,
) -> Result<(), InitError> {
    let via = if gateway.is_some() { u32::from(libc::RTF_GATEWAY) } else { 0 };
    let request = RouteRequest {
        destination: in6(destination),
        source: in6(Ipv6Addr::UNSPECIFIED),
        gateway: in6(gateway.unwrap_or(Ipv6Addr::UNSPECIFIED)),
        kind: 0,
        destination_prefix: prefix,
        source_prefix: 0,
        metric: ROUTE_METRIC,
        info: 0,
        flags: u32::from(libc::RTF_UP) | via,
        index: c_int::try_from(index).unwrap_or(c_int::MAX),
    };
    // SAFETY: on an IPv6 socket SIOCADDRT reads an `in6_rtmsg`, which outlives the call.
    match unsafe { ioctl(libc::SIOCADDRT, &raw const request) } {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
            Err(InitError::at("add the route to", format!("{destination}/{prefix}"))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn in6(address: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr { s6_addr: address.octets() }
}

/// # Safety
/// `argument` must point to what `request` reads.
unsafe fn ioctl<T>(request: libc::Ioctl, argument: *const T) -> io::Result<()> {
    let socket = control_socket().map_err(io::Error::other)?;
    // SAFETY: the caller vouches for the argument; the socket is open until the end of this function.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
