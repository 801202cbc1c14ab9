//! What a guest may send at all, and how much goes through its TAP in each direction.
//!
//! A guest has one IPv6 address and nothing else, so nothing else is taken from it: no IPv4, and with it no metadata
//! service of a cloud at 169.254.169.254, whether the host answers there itself or would pass it on; and none of the IPv6
//! addresses at which clouds have put theirs. Nothing of a guest's goes on through this host, even where somebody has turned
//! forwarding on: tenants do not reach one another. What a TAP takes in a second is bounded, so that no guest fills the host's
//! queues: towards the guest by a token bucket, from it by a filter that drops what is too much.
//!
//! The filter is one table for all TAPs of an agent, by the beginning of their names. It is put up anew before each TAP
//! comes up, in one transaction, so that a firewall that was flushed meanwhile is whole again before a guest can send.

use std::io::ErrorKind;

use super::NetworkError;
use super::tool::Tool;

/// What the name of every agent's table begins with; `holdfast doctor` looks for it.
pub const TABLE_PREFIX: &str = "holdfast_";

/// Bits of a megabit.
const MEGABIT: u64 = 1_000_000;

/// The bounds of [`Rate`], in megabits per second.
const MEGABITS_MIN: u64 = 1;
const MEGABITS_MAX: u64 = 100_000;

/// The least burst, in bytes: a packet that the kernel joined from many is up to 64 KiB, and one that does not fit is lost.
const BURST_BYTES_MIN: u64 = 128 * 1024;

/// A burst is what the rate gives in this part of a second.
const BURST_DIVISOR: u64 = 100;

/// How long a packet towards a guest may wait, in milliseconds.
const QUEUE_MS_MAX: u64 = 50;

/// TAPs of which the filter remembers how much they sent.
const FLOODS_MAX: u32 = 65_536;

/// Where clouds have their metadata service on IPv6, as published by Amazon and Google.
const METADATA_V6: &str = "fd00:ec2::254, fd20:ce::254";

/// How much goes through a TAP in a second, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    bytes_per_second: u64,
}

/// Why a rate is none.
#[derive(Debug, thiserror::Error)]
#[error("A network rate is from {MEGABITS_MIN} to {MEGABITS_MAX} megabits per second, not {megabits}.")]
pub struct RateError {
    megabits: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { bytes_per_second: Self::MEGABITS_DEFAULT * MEGABIT / 8 }
    }
}

impl Rate {
    /// Megabits per second, when nothing is said.
    pub const MEGABITS_DEFAULT: u64 = 1_000;

    /// So many megabits per second.
    pub fn megabits(megabits: u64) -> Result<Self, RateError> {
        if (MEGABITS_MIN..=MEGABITS_MAX).contains(&megabits) {
            Ok(Self { bytes_per_second: megabits * MEGABIT / 8 })
        } else {
            Err(RateError { megabits })
        }
    }

    fn burst_bytes(self) -> u64 {
        (self.bytes_per_second / BURST_DIVISOR).max(BURST_BYTES_MIN)
    }
}

/// The name of an agent's table.
pub(super) fn table(tag: &str) -> String {
    format!("{TABLE_PREFIX}{tag}")
}

/// What `nft` is told: the table as it must be, whatever it was.
fn rules(tag: &str, taps: &str, rate: Rate) -> String {
    let (table, bytes, burst) = (table(tag), rate.bytes_per_second, rate.burst_bytes());
    format!(
        "table inet {table} {{\n}}\n\
         delete table inet {table}\n\
         table inet {table} {{\n\
         set flood {{\ntype ifname\nflags dynamic\nsize {FLOODS_MAX}\ntimeout 1m\n}}\n\
         chain guests {{\n\
         type filter hook prerouting priority raw; policy accept;\n\
         iifname != \"{taps}*\" accept\n\
         meta nfproto != ipv6 counter drop\n\
         ip6 daddr {{ {METADATA_V6} }} counter drop\n\
         update @flood {{ iifname limit rate over {bytes} bytes/second burst {burst} bytes }} counter drop\n\
         }}\n\
         chain onward {{\n\
         type filter hook forward priority filter; policy accept;\n\
         iifname \"{taps}*\" counter drop\n\
         }}\n}}\n"
    )
}

/// Puts up the filter for every TAP whose name begins with `taps`.
pub(super) async fn put_up(tag: &str, taps: &str, rate: Rate) -> Result<(), NetworkError> {
    Tool::Nft.run(&["-f", "-"], Some(rules(tag, taps, rate))).await.map(drop)
}

/// Takes it down for good. One that is not there is no error; nor is a host without `nft`, which never had any.
pub(super) async fn take_down(tag: &str) -> Result<(), NetworkError> {
    let table = table(tag);
    let removal = format!("table inet {table} {{\n}}\ndelete table inet {table}\n");
    match Tool::Nft.run(&["-f", "-"], Some(removal)).await {
        Err(NetworkError::Spawn { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.map(drop),
    }
}

/// Bounds what goes to a guest.
pub(super) async fn bound(tap: &str, rate: Rate) -> Result<(), NetworkError> {
    // `tc` knows bytes per second as «bps».
    let (rate, burst) = (format!("{}bps", rate.bytes_per_second), rate.burst_bytes().to_string());
    let latency = format!("{QUEUE_MS_MAX}ms");
    let arguments =
        ["qdisc", "replace", "dev", tap, "root", "tbf", "rate", &rate, "burst", &burst, "latency", &latency];
    Tool::Tc.run(&arguments, None).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bounded_and_its_burst_holds_the_largest_packet() {
        assert!(Rate::megabits(0).is_err() && Rate::megabits(MEGABITS_MAX + 1).is_err());
        assert_eq!(Rate::megabits(Rate::MEGABITS_DEFAULT).unwrap(), Rate::default());
        let slowest = Rate::megabits(MEGABITS_MIN).unwrap();
        assert_eq!((slowest.bytes_per_second, slowest.burst_bytes()), (125_000, BURST_BYTES_MIN));
        assert_eq!(Rate::default().burst_bytes(), 1_250_000);
    }
}
