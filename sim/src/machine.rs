//! What the operating system says to this process: the time, randomness, and that nothing came of a wait; all taken over
//! in a simulation.
//!
//! The three functions below stand before libc's in this executable, so that the standard library, tokio, `rand` and
//! every other crate see simulated time and seeded randomness without knowing, and a runtime that goes to sleep says for
//! how long instead. Until [`take_over`] they pass on to the kernel.

use std::ffi::{c_int, c_long, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering};
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
/// How long the last wait would have been, in milliseconds; less than nothing is for ever.
static WAIT_MS: AtomicI32 = AtomicI32::new(0);

/// For how long a runtime wanted to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all.
    No,
    /// So many milliseconds.
    Ms(u64),
    /// Until it is woken.
    ForEver,
}

/// The last wait of any runtime.
pub(crate) fn last_wait() -> Wait {
    match WAIT_MS.load(Ordering::Relaxed) {
        0 => Wait::No,
        ms => u64::try_from(ms).map_or(Wait::ForEver, Wait::Ms),
    }
}

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

/// Lets the allocator keep what was freed. Disks and their caches are taken and given back all the time, and without this
/// half of what the kernel does for a run is to clear pages.
pub(crate) fn keep_memory() {
    const KEPT_BYTES: c_int = 256 << 20;
    // SAFETY: both only set a number in the allocator; a refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// How much processor time the processes took that this one waited for.
pub(crate) fn children_cpu() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes a `rusage` there; all its fields may also be zero.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    let time =
        |time: libc::timeval| Duration::from_micros(time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64);
    time(usage.ru_utime) + time(usage.ru_stime)
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

/// libc's `epoll_wait`, with which tokio waits for its next timer. In a simulation nothing is ever ready, and nobody waits.
///
/// # Safety
/// As libc's: `events` has room for `count` events.
#[unsafe(no_mangle)]
#[expect(unreachable_pub, reason = "the linker reaches it")]
pub unsafe extern "C" fn epoll_wait(
    epoll: c_int,
    events: *mut libc::epoll_event,
    count: c_int,
    timeout_ms: c_int,
) -> c_int {
    if SIMULATED.load(Ordering::Relaxed) {
        WAIT_MS.store(timeout_ms, Ordering::Relaxed);
        return 0;
    }
    // SAFETY: the kernel checks its arguments, and the caller promised the room; without a mask of signals it is
    // `epoll_wait`.
    unsafe { libc::epoll_pwait(epoll, events, count, timeout_ms, std::ptr::null()) }
}
