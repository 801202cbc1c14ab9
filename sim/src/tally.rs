//! What happened in a run, in numbers, and the sum of many runs. A run says its own in words that the process that started
//! it reads again.

use std::fmt;

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Requests of clients that were answered.
    pub(crate) requests: u64,
    /// Of old requests, how many were asked again.
    pub(crate) repeats: u64,
    /// Faults that were caused.
    pub(crate) faults: u64,
    /// How often a member came to lead.
    pub(crate) leaders: u64,
    /// Entries of the log that were applied.
    pub(crate) entries: u64,
    /// Events that watchers saw.
    pub(crate) watched: u64,
    /// Streams on which they did.
    pub(crate) streams: u64,
    /// Tables that edges put in force.
    pub(crate) tables: u64,
    /// How often an edge went down.
    pub(crate) edge_crashes: u64,
    /// Simulated VMMs that were started.
    pub(crate) machines: u64,
    /// How often a node's agent or its host went down.
    pub(crate) deaths: u64,
}

impl Tally {
    fn fields(&mut self) -> [(&'static str, &mut u64); 11] {
        [
            ("requests", &mut self.requests),
            ("repeats", &mut self.repeats),
            ("faults", &mut self.faults),
            ("leaders", &mut self.leaders),
            ("entries", &mut self.entries),
            ("watched events", &mut self.watched),
            ("streams", &mut self.streams),
            ("tables", &mut self.tables),
            ("crashes of edges", &mut self.edge_crashes),
            ("machines", &mut self.machines),
            ("agents' deaths", &mut self.deaths),
        ]
    }

    /// Adds another run's.
    pub(crate) fn add(&mut self, mut other: Tally) {
        for ((_, mine), (_, theirs)) in self.fields().into_iter().zip(other.fields()) {
            *mine += *theirs;
        }
    }

    /// Reads what [`fmt::Display`] wrote at the beginning of `text`; what is not there counts nothing.
    pub(crate) fn read(text: &str) -> Tally {
        let mut tally = Tally::default();
        for part in text.split([',', ';']) {
            let Some((number, name)) = part.trim().split_once(' ') else { continue };
            let field = tally.fields().into_iter().find(|(known, _)| *known == name);
            if let (Some((_, slot)), Ok(number)) = (field, number.parse()) {
                *slot = number;
            }
        }
        tally
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut copy = *self;
        for (at, (name, count)) in copy.fields().into_iter().enumerate() {
            write!(f, "{}{count} {name}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_is_read_as_it_was_written() {
        let mut tally = Tally { requests: 512, entries: 700, deaths: 3, ..Tally::default() };
        assert_eq!(Tally::read(&format!("{tally}; 3 members, 5 clients")), tally);
        tally.add(tally);
        assert_eq!((tally.requests, tally.entries), (1024, 1400));
    }
}
