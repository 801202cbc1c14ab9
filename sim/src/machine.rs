//! What the operating system says to this process: the time and randomness, both taken over in a simulation.
//!
//! The two functions below stand before libc's in this executable, so that the standard library, tokio, `rand` and every
//! other crate see simulated time and seeded randomness without knowing. Until [`take_over`] they pass on to the kernel.

use std::ffi::{c_int, c_long, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// The wall clock's time at the start of a simulation, in seconds since 1970.
const WALL_START_S: i64 = 1_800_000_000;
/// The monotonic clock's time at the start, in seconds: far from zero, because programs subtract from it.
const MONOTONIC_START_S: i64 = 1_000_000;
const NANOS: i64 = 1_000_000_000;

static SIMULATED: AtomicBool = AtomicBool::new(false);
static ENTROPY: AtomicU64 = AtomicU64::new(0);
static NOW_NS: AtomicU64 = AtomicU64::new(0);
static WALL_OFFSET_MS: AtomicI64 = AtomicI64::new(0);

/// From now on this process has simulated time, which begins at zero, and randomness from a seed. It may have one thread.
pub(crate) fn take_over(seed: u64) {
    ENTROPY.store(seed ^ 0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    NOW_NS.store(0, Ordering::Relaxed);
    SIMULATED.store(true, Ordering::Relaxed);
}

/// Sets the time since the start of the simulation, and by how much the current host's wall clock is wrong.
pub(crate) fn set_time(since_start: Duration, wall_offset_ms: i64) {
    NOW_NS.store(since_start.as_nanos() as u64, Ordering::Relaxed);
    WALL_OFFSET_MS.store(wall_offset_ms, Ordering::Relaxed);
}

/// The current host's wall clock, in milliseconds since 1970.
pub(crate) fn wall_ms() -> u64 {
    let since_start_ms = NOW_NS.load(Ordering::Relaxed) / 1_000_000;
    let wall = WALL_START_S * 1000 + WALL_OFFSET_MS.load(Ordering::Relaxed);
    since_start_ms.saturating_add_signed(wall)
}

/// The next random word: splitmix64.
fn next_word() -> u64 {
    let state = ENTROPY.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// libc's `getrandom`.
///
/// # Safety
/// As libc's: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
#[expect(unreachable_pub, reason = "the linker reaches it")]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    if !SIMULATED.load(Ordering::Relaxed) {
        // SAFETY: the kernel checks its arguments, and the caller promised the room.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) } as isize;
    }
    if length > 0 {
        // SAFETY: the caller promised `length` writable bytes, and there is at least one.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&next_word().to_le_bytes()[..part.len()]);
        }
    }
    length as isize
}

/// libc's `clock_gettime`.
///
/// # Safety
/// As libc's: `time` may be written.
#[unsafe(no_mangle)]
#[expect(unreachable_pub, reason = "the linker reaches it")]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    if !SIMULATED.load(Ordering::Relaxed) {
        // SAFETY: the kernel checks its arguments.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as c_int;
    }
    let start = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => {
            WALL_START_S * NANOS + WALL_OFFSET_MS.load(Ordering::Relaxed) * 1_000_000
        }
        _ => MONOTONIC_START_S * NANOS,
    };
    let now = start + NOW_NS.load(Ordering::Relaxed) as i64;
    let answer = libc::timespec { tv_sec: now / NANOS, tv_nsec: (now % NANOS) as c_long };
    // SAFETY: the caller promised that it may be written.
    unsafe { time.write(answer) };
    0
}
