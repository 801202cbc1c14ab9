//! How often each kind of thing happened in a run, and in many runs together: a kind that never happens is then seen.

use std::collections::BTreeMap;
use std::fmt;

/// One kind of thing.
pub(crate) type Kind = &'static str;

pub(crate) const PARTITION: Kind = "partitions";
pub(crate) const ONE_WAY_PARTITION: Kind = "of them one-way";
pub(crate) const FRAME_HELD: Kind = "frames held by a partition";
pub(crate) const WEATHER: Kind = "spells of weather";
pub(crate) const FRAME_LATE: Kind = "frames late by weather";
pub(crate) const FRAME_LOST: Kind = "frames lost";
pub(crate) const FRAME_DOUBLED: Kind = "frames doubled";
pub(crate) const FRAME_OVERTAKEN: Kind = "frames overtaken";
pub(crate) const KILL: Kind = "kills";
pub(crate) const POWER_LOSS: Kind = "power losses";
pub(crate) const POWER_LOSS_IN_WRITE: Kind = "of them in a write";
pub(crate) const WRITES_LOST: Kind = "of them with writes lost";
pub(crate) const BLACKOUT: Kind = "blackouts";
pub(crate) const SLOW_DISK: Kind = "slow disks";
pub(crate) const FULL_DISK: Kind = "full disks";
pub(crate) const FAILED_SYNC: Kind = "disks that cannot sync";
pub(crate) const STOPPED_BY_DISK: Kind = "members stopped by a disk";
pub(crate) const BIT_ROT: Kind = "rotten states";
pub(crate) const CLOCK_JUMP: Kind = "clock jumps";
pub(crate) const DRIFT: Kind = "drifting clocks";
pub(crate) const TRANSFER: Kind = "hand-overs";
pub(crate) const SNAPSHOT: Kind = "snapshots asked for";
pub(crate) const MEMBERSHIP: Kind = "membership changes";
pub(crate) const UPGRADE: Kind = "upgrades";
pub(crate) const GOING_BACK: Kind = "upgrades taken back";
pub(crate) const RAISE: Kind = "version raises";
pub(crate) const THREE: Kind = "clusters of three";
pub(crate) const FIVE: Kind = "clusters of five";

/// All of them, as they are told.
const ALL: [Kind; 28] = [
    PARTITION,
    ONE_WAY_PARTITION,
    FRAME_HELD,
    WEATHER,
    FRAME_LATE,
    FRAME_LOST,
    FRAME_DOUBLED,
    FRAME_OVERTAKEN,
    KILL,
    POWER_LOSS,
    POWER_LOSS_IN_WRITE,
    WRITES_LOST,
    BLACKOUT,
    SLOW_DISK,
    FULL_DISK,
    FAILED_SYNC,
    STOPPED_BY_DISK,
    BIT_ROT,
    CLOCK_JUMP,
    DRIFT,
    TRANSFER,
    SNAPSHOT,
    MEMBERSHIP,
    UPGRADE,
    GOING_BACK,
    RAISE,
    THREE,
    FIVE,
];

/// How often each happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Happened(BTreeMap<Kind, u64>);

impl Happened {
    /// It happened once more.
    pub(crate) fn note(&mut self, kind: Kind) {
        self.count(kind, 1);
    }

    /// It happened so many times more.
    pub(crate) fn count(&mut self, kind: Kind, times: u64) {
        if times > 0 {
            *self.0.entry(kind).or_default() += times;
        }
    }

    /// Adds another run's.
    pub(crate) fn add(&mut self, other: &Happened) {
        other.0.iter().for_each(|(kind, times)| self.count(kind, *times));
    }

    /// Reads what [`fmt::Display`] wrote.
    pub(crate) fn read(text: &str) -> Happened {
        let mut happened = Happened::default();
        for part in text.split(", ") {
            let Some((number, name)) = part.trim().split_once(' ') else { continue };
            let kind = ALL.into_iter().find(|kind| *kind == name);
            if let (Some(kind), Ok(times)) = (kind, number.parse()) {
                happened.count(kind, times);
            }
        }
        happened
    }
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, kind) in ALL.into_iter().enumerate() {
            let times = self.0.get(kind).copied().unwrap_or_default();
            write!(f, "{}{times} {kind}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_read_as_it_was_written_and_says_what_did_not() {
        let mut happened = Happened::default();
        ALL.into_iter().skip(1).for_each(|kind| happened.note(kind));
        happened.count(FRAME_HELD, 41);
        let told = happened.to_string();
        assert_eq!(Happened::read(&told), happened);
        assert!(told.starts_with("0 partitions, 1 of them one-way, 42 frames held"), "{told}");
        let once = happened.clone();
        happened.add(&once);
        assert!(happened.to_string().contains("84 frames held by a partition"));
    }
}
