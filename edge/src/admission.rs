//! Who may come in: how many connections in all, how many of one source, and how much memory unfinished hellos take.
//!
//! Overload sheds new connections first; whoever is in stays. Every permit gives its place back when it is dropped.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What every unfinished hello may hold uncharged, in bytes: usual ones fit, post-quantum key shares included. So the
/// shared memory, when somebody uses it up with large and slow hellos, is missed by other large ones alone.
pub const HELLO_FREE_BYTES: usize = 4 << 10;

/// The gate in front of all ports.
#[derive(Debug)]
pub struct Admission {
    places: Arc<Semaphore>,
    places_max: usize,
    per_source_max: usize,
    /// Connections of each source that has any: never more entries than places.
    sources: Mutex<HashMap<Source, usize>>,
    hello_bytes: AtomicUsize,
    hello_bytes_max: usize,
}

/// Why a connection was not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// All places are taken.
    Full,
    /// The source has all the places that it may have.
    Source,
}

/// A place for one connection.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    source: Source,
    _place: OwnedSemaphorePermit,
}

/// Memory that an unfinished hello holds beyond [`HELLO_FREE_BYTES`].
#[derive(Debug)]
pub struct HelloMemory<'a> {
    admission: &'a Admission,
    bytes: usize,
}

/// Whoever counts as one source: an IPv4 address, or an IPv6 /64, which is what one subscriber gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Source(u64);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            // No global /64 begins with 32 zero bits, so that the two kinds never meet.
            IpAddr::V4(v4) => Self(u64::from(u32::from(v4))),
            IpAddr::V6(v6) => Self((u128::from(v6) >> 64) as u64),
        }
    }
}

impl Admission {
    /// A gate with these bounds.
    pub fn new(places_max: usize, per_source_max: usize, hello_bytes_max: usize) -> Arc<Self> {
        let places_max = places_max.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            places: Arc::new(Semaphore::new(places_max)),
            places_max,
            per_source_max,
            sources: Mutex::default(),
            hello_bytes: AtomicUsize::new(0),
            hello_bytes_max,
        })
    }

    /// Takes a place for a connection from `peer`.
    ///
    /// # Errors
    /// [`Shed`] says which bound is reached; the connection is to be closed.
    pub fn admit(self: &Arc<Self>, peer: IpAddr) -> Result<Place, Shed> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| Shed::Full)?;
        let source = Source::from(peer);
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let count = sources.entry(source).or_insert(0);
        if *count >= self.per_source_max {
            return Err(Shed::Source);
        }
        *count += 1;
        drop(sources);
        Ok(Place { admission: Arc::clone(self), source, _place: place })
    }

    /// Connections that are in.
    pub fn connections(&self) -> usize {
        self.places_max - self.places.available_permits()
    }

    /// The account of one unfinished hello, which holds nothing yet.
    pub fn hello_memory(&self) -> HelloMemory<'_> {
        HelloMemory { admission: self, bytes: 0 }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut sources = self.admission.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

impl HelloMemory<'_> {
    /// Accounts for a buffer of now `bytes`; false when that is more than all hellos together may take.
    pub fn grow_to(&mut self, bytes: usize) -> bool {
        let more = bytes.saturating_sub(HELLO_FREE_BYTES).saturating_sub(self.bytes);
        if more == 0 {
            return true;
        }
        self.bytes += more;
        let before = self.admission.hello_bytes.fetch_add(more, Ordering::Relaxed);
        before + more <= self.admission.hello_bytes_max
    }
}

impl Drop for HelloMemory<'_> {
    fn drop(&mut self) {
        self.admission.hello_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_in_all_and_per_source_and_come_back() {
        let gate = Admission::new(3, 2, 0);
        let (one, two): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let first = gate.admit(one).unwrap();
        let _second = gate.admit("::ffff:192.0.2.1".parse().unwrap()).unwrap();
        assert_eq!(gate.admit(one).unwrap_err(), Shed::Source);
        let _third = gate.admit(two).unwrap();
        assert_eq!(gate.admit(two).unwrap_err(), Shed::Full);
        assert_eq!(gate.connections(), 3);
        drop(first);
        assert_eq!(gate.connections(), 2);
        let _fourth = gate.admit(one).unwrap();
        assert_eq!(gate.sources.lock().unwrap().len(), 2);
    }

    #[test]
    fn an_ipv6_source_is_its_64() {
        let gate = Admission::new(9, 1, 0);
        let _first = gate.admit("2001:db8::1".parse().unwrap()).unwrap();
        assert_eq!(gate.admit("2001:db8::2".parse().unwrap()).unwrap_err(), Shed::Source);
        assert!(gate.admit("2001:db8:0:1::2".parse().unwrap()).is_ok());
        assert_eq!(gate.sources.lock().unwrap().len(), 1, "a source without connections is forgotten");
    }

    #[test]
    fn memory_of_hellos_is_bounded_over_all_of_them() {
        let gate = Admission::new(1, 1, 1000);
        let mut one = gate.hello_memory();
        assert!(one.grow_to(HELLO_FREE_BYTES + 600) && one.grow_to(HELLO_FREE_BYTES + 600));
        let mut two = gate.hello_memory();
        assert!(!two.grow_to(HELLO_FREE_BYTES + 401));
        let mut usual = gate.hello_memory();
        assert!(usual.grow_to(HELLO_FREE_BYTES), "an attacker's hellos must not shed usual ones");
        drop(two);
        assert!(gate.hello_memory().grow_to(HELLO_FREE_BYTES + 400));
        drop(one);
        assert_eq!(gate.hello_bytes.load(Ordering::Relaxed), 0);
    }
}
