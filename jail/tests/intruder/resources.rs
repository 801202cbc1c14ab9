//! What an attacker takes of the host without being let to: memory, processes, processors. `Ok` is a success of his.

use std::collections::BTreeMap;
use std::io::Error;
use std::time::{Duration, Instant};

type Given = BTreeMap<String, String>;
type Outcome = std::io::Result<String>;

const PAGE_BYTES: usize = 4_096;

/// How much is taken between two looks.
const STEP_BYTES: usize = 1 << 20;

/// What the attacker has of the host's processors when he is bounded, in thousandths of one, and when he is not: the
/// What is read at a time.
const READ_BYTES: usize = 64 << 10;
/// From which rate on a disk counts as not bounded: twice what its group may, in bytes a second.
const DISK_RATE_MIN: u128 = 2 << 20;
/// success lies in the middle.
const CPU_MILLI_MIN: u128 = 3_000;

/// Makes one of these attempts; `None` if it is another one.
pub(crate) fn attempt(name: &str, given: &Given) -> Option<Outcome> {
    Some(match name {
        "eat_memory" => eat_memory(number(given, "eat_bytes")),
        "fork_bomb" => fork_bomb(number(given, "processes")),
        "read_disk" => read_disk(number(given, "read_bytes")),
        "burn_cpu" => burn_cpu(number(given, "threads"), number(given, "burn_ms") as u64),
        _ => return None,
    })
}

fn number(given: &Given, name: &str) -> usize {
    given.get(name).unwrap_or_else(|| panic!("{name} is needed")).parse().unwrap()
}

/// Beside a process that does no harm: the whole group is to go, not only the one that eats.
fn eat_memory(bytes: usize) -> Outcome {
    // Where another wall refuses that, he eats alone.
    fork_one().ok();
    let mut held: Vec<Vec<u8>> = Vec::new();
    for _ in 0..bytes / STEP_BYTES {
        let mut more = vec![0_u8; STEP_BYTES];
        // What was never written to is not there yet.
        more.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 1);
        held.push(more);
    }
    let kept: usize = held.iter().map(|part| usize::from(std::hint::black_box(part)[0])).sum();
    Ok(format!("{} MiB", (kept * STEP_BYTES) >> 20))
}

fn fork_bomb(processes: usize) -> Outcome {
    for made in 0..processes {
        if let Err(error) = fork_one() {
            // A wall that lets a VMM have no process is no use.
            assert!(made > 8, "no processes at all: {error}");
            return Err(Error::other(format!("{made} processes, then {error}")));
        }
    }
    Ok(format!("{processes} processes"))
}

/// A child that sleeps until it is killed.
fn fork_one() -> std::io::Result<()> {
    // SAFETY: there is one thread, and the child does nothing but wait.
    match unsafe { libc::fork() } {
        -1 => Err(Error::last_os_error()),
        0 => loop {
            // SAFETY: a plain system call.
            unsafe { libc::pause() };
        },
        _ => Ok(()),
    }
}

/// Spins until so much of the processors' time is used; judged by the kernel's count of it.
fn burn_cpu(threads: usize, burn_ms: u64) -> Outcome {
    let begun = Instant::now();
    let budget = Duration::from_millis(burn_ms);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while used() < budget {
                    for n in 0..100_000_u32 {
                        std::hint::black_box(n);
                    }
                }
            });
        }
    });
    let (used, took) = (used().as_micros(), begun.elapsed().as_micros().max(1));
    let milli = used * 1_000 / took;
    let seen = format!("{milli} thousandths of a processor");
    if milli >= CPU_MILLI_MIN { Ok(seen) } else { Err(Error::other(seen)) }
}

/// Reads the host's disk past every cache, as fast as it comes.
fn read_disk(bytes: usize) -> Outcome {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
    let disk = rustix::fs::open("/dev/vda", flags, rustix::fs::Mode::empty())?;
    // Such reads want memory and places in whole blocks.
    let mut room = vec![0_u8; READ_BYTES + PAGE_BYTES];
    let start = room.as_ptr().align_offset(PAGE_BYTES);
    let begun = Instant::now();
    for n in 0..bytes / READ_BYTES {
        let read = rustix::io::pread(&disk, &mut room[start..start + READ_BYTES], (n * READ_BYTES) as u64)?;
        if read < READ_BYTES {
            return Err(Error::other("the disk is too small"));
        }
    }
    let each_second = bytes as u128 * 1_000 / begun.elapsed().as_millis().max(1);
    let seen = format!("{} KiB a second", each_second >> 10);
    if each_second >= DISK_RATE_MIN { Ok(seen) } else { Err(Error::other(seen)) }
}

/// Of the whole process.
fn used() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a whole structure that lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
