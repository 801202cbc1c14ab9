//! A disk for tests, in memory, under the real redb: it loses and tears what was not synced, refuses writes and syncs,
//! lies about them, and loses power at a chosen write.
//!
//! What it assumes of a disk is what the product assumes: a completed sync survives; what was not synced may be there,
//! whole or in part, in any combination of sectors. Nothing of this is part of the product.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rand::{Rng, RngExt};
use redb::StorageBackend;

/// Bytes that a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

impl Change {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Change::Length(length) => image.resize(*length, 0),
            Change::Write(offset, bytes) => {
                let end = (offset + bytes.len()).min(image.len());
                if *offset < end {
                    image[*offset..end].copy_from_slice(&bytes[..end - offset]);
                }
            }
        }
    }
}

/// What lies on the disk at one moment: everything that was synced, and what was written after that.
#[derive(Clone, Default)]
pub struct Image {
    synced: Vec<u8>,
    unsynced: Vec<Change>,
}

impl Image {
    /// What is found after the power came back: any of the unsynced changes, torn at sectors.
    pub fn after_power_loss(&self, rng: &mut impl Rng) -> Vec<u8> {
        let mut image = self.synced.clone();
        for change in &self.unsynced {
            if rng.random_bool(0.5) {
                continue;
            }
            match change {
                Change::Write(offset, bytes) => {
                    for (number, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        if rng.random_bool(0.7) {
                            Change::Write(offset + number * SECTOR_BYTES, sector.to_vec()).apply(&mut image);
                        }
                    }
                }
                // A file that grew may be found short or long; a length is never torn.
                Change::Length(_) => change.apply(&mut image),
            }
        }
        image
    }

    /// What was synced, and nothing else.
    pub fn synced(&self) -> Vec<u8> {
        self.synced.clone()
    }
}

/// What a disk does that it should not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Syncs fail.
    pub sync_fails: bool,
    /// Writes find no room.
    pub write_fails: bool,
    /// Syncs succeed and do nothing.
    pub lies: bool,
}

#[derive(Default)]
struct State {
    current: Vec<u8>,
    image: Image,
    faults: Faults,
    /// Counts down writes and syncs; at zero the image is kept as that of the crash.
    crash_in: Option<u64>,
    crashed: Option<Image>,
    /// After the crash nothing is taken any more.
    off: bool,
    /// Whether the crash also turns it off.
    off_at_crash: bool,
    syncs: u64,
    growths: u64,
    /// Syncs wait.
    stalls: bool,
    /// How many do.
    stalled: u64,
    /// The next sync fails, once.
    fails_next_sync: bool,
}

impl State {
    fn step(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.crash_in {
            *left = left.saturating_sub(1);
            if *left == 0 && self.crashed.is_none() {
                self.crashed = Some(self.image.clone());
                self.off |= self.off_at_crash;
            }
        }
        self.powered()
    }

    fn powered(&self) -> io::Result<()> {
        if self.off { Err(io::Error::other("the disk has no power")) } else { Ok(()) }
    }

    fn change(&mut self, change: Change) -> io::Result<()> {
        self.powered()?;
        if self.faults.write_fails {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        change.apply(&mut self.current);
        self.image.unsynced.push(change);
        self.step()
    }
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub struct Disk(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told when syncs need not wait any more.
    goes_on: Condvar,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disk")
    }
}

impl Disk {
    /// A disk that holds these bytes, synced.
    pub fn of(image: Vec<u8>) -> Self {
        let disk = Disk::default();
        {
            let mut state = disk.state();
            state.current.clone_from(&image);
            state.image.synced = image;
        }
        disk
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on misbehaves like this.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// The next sync fails, and those after it succeed: they say nothing of what was written before the one that failed,
    /// and that is lost when the power goes.
    pub fn fail_next_sync(&self) {
        self.state().fails_next_sync = true;
    }

    /// From now on syncs wait until [`Disk::go_on`].
    pub fn stall_syncs(&self) {
        self.state().stalls = true;
    }

    /// Syncs wait no more.
    pub fn go_on(&self) {
        self.state().stalls = false;
        self.0.goes_on.notify_all();
    }

    /// How many syncs wait now.
    pub fn stalled(&self) -> u64 {
        self.state().stalled
    }

    /// Keeps what is on the disk after so many more writes and syncs; goes on as if nothing had happened.
    pub fn remember_after(&self, steps: u64) {
        self.state().crash_in = Some(steps);
    }

    /// Loses power after so many more writes and syncs: that step may still happen, and none after it.
    pub fn lose_power_after(&self, steps: u64) {
        let mut state = self.state();
        state.crash_in = Some(steps);
        state.off_at_crash = true;
    }

    /// One bit rots, in what a reader sees and in what survives a crash. Nothing happens beyond the end.
    pub fn flip_bit(&self, offset: u64, bit: u32) {
        let mut state = self.state();
        let State { current, image, .. } = &mut *state;
        for bytes in [current, &mut image.synced] {
            if let Some(byte) = bytes.get_mut(offset as usize) {
                *byte ^= 1 << (bit % 8);
            }
        }
    }

    /// Forgets everything, as a new disk would. Only for a disk that nobody has open.
    pub fn wipe(&self) {
        let mut state = self.state();
        state.current.clear();
        state.image = Image::default();
    }

    /// How many bytes a reader sees.
    pub fn bytes(&self) -> u64 {
        self.state().current.len() as u64
    }

    /// Loses no power after all, unless it has already.
    pub fn keep_power(&self) {
        let mut state = self.state();
        if !state.off {
            state.crash_in = None;
            state.off_at_crash = false;
        }
    }

    /// Takes nothing any more, from now on.
    pub fn turn_off(&self) {
        self.state().off = true;
    }

    /// Whether it lost its power.
    pub fn is_off(&self) -> bool {
        self.state().off
    }

    /// What was on the disk at the chosen step, once that came.
    pub fn crashed(&self) -> Option<Image> {
        self.state().crashed.clone()
    }

    /// What is on the disk now.
    pub fn image(&self) -> Image {
        self.state().image.clone()
    }

    /// What a reader sees now, synced or not: what a process that is killed leaves.
    pub fn current(&self) -> Vec<u8> {
        self.state().current.clone()
    }

    /// The same disk with the power on and without faults, synced as far as it was: for the process that comes after
    /// one that was killed. The old one stays off.
    pub fn for_next_process(&self) -> Self {
        let mut state = self.state();
        state.off = true;
        let fresh = State { current: state.current.clone(), image: state.image.clone(), ..State::default() };
        Disk(Arc::new(Shared { state: Mutex::new(fresh), ..Shared::default() }))
    }

    /// The disk after the power came back; the old one stays off.
    pub fn after_power_loss(&self, rng: &mut impl Rng) -> Self {
        let image = {
            let mut state = self.state();
            state.off = true;
            state.crashed.take().unwrap_or_else(|| state.image.clone())
        };
        Disk::of(image.after_power_loss(rng))
    }

    /// Two files on this disk: one of a fixed length, and one behind it that grows. What happens to the disk happens to both.
    ///
    /// # Errors
    /// When the disk takes nothing.
    pub fn split(&self, bytes: u64) -> io::Result<(Part, Part)> {
        if self.bytes() < bytes {
            self.set_len(bytes)?;
        }
        let part = |from, fixed| Part { disk: self.clone(), from, fixed };
        Ok((part(0, Some(bytes)), part(bytes, None)))
    }

    /// How often its file grew.
    pub fn growths(&self) -> u64 {
        self.state().growths
    }

    /// How often it was synced.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.state().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let state = self.state();
        let start = offset as usize;
        let bytes = state.current.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let mut state = self.state();
        state.growths += u64::from(len as usize > state.current.len());
        state.change(Change::Length(len as usize))
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut state = self.state();
        while state.stalls {
            state.stalled += 1;
            state = self.0.goes_on.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.stalled -= 1;
        }
        state.powered()?;
        if state.fails_next_sync {
            state.fails_next_sync = false;
            // The kernel takes what it could not write for written: no later sync tries it again.
            state.image.unsynced.clear();
            return Err(io::Error::other("the disk could not sync"));
        }
        if state.faults.sync_fails {
            return Err(io::Error::other("the disk could not sync"));
        }
        // A sync during which the power goes has done nothing for certain.
        state.step()?;
        if !state.faults.lies {
            let State { image, .. } = &mut *state;
            let changes = std::mem::take(&mut image.unsynced);
            changes.iter().for_each(|change| change.apply(&mut image.synced));
        }
        state.syncs += 1;
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.state().change(Change::Write(offset as usize, data.to_vec()))
    }
}

/// One of two files on a disk: see [`Disk::split`].
#[derive(Clone, Debug)]
pub struct Part {
    disk: Disk,
    from: u64,
    /// Its length, where that does not change.
    fixed: Option<u64>,
}

impl StorageBackend for Part {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.fixed.unwrap_or_else(|| self.disk.bytes().saturating_sub(self.from)))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.disk.read(self.from + offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        match self.fixed {
            Some(fixed) if fixed == len => Ok(()),
            Some(_) => Err(io::Error::from(io::ErrorKind::Unsupported)),
            None => self.disk.set_len(self.from + len),
        }
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.disk.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.disk.write(self.from + offset, data)
    }
}
