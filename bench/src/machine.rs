//! What the figures were measured on.

use holdfast_bench::error::BenchError;
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Appends that the disk is timed with.
const APPENDS: usize = 200;

/// Appends with fdatasync that the disk is timed with: their bytes, whether into space that the file already has, and
/// what they are called.
pub const BARE_APPENDS: [(usize, bool, &str); 4] = [
    (512, false, "512 B, growing file"),
    (4096, false, "4 KiB, growing file"),
    (512, true, "512 B, preallocated file"),
    (4096, true, "4 KiB, preallocated file"),
];

/// Median time of an append with fdatasync in this folder.
pub fn disk_sync(folder: &Path, bytes: usize, preallocated: bool) -> Result<Duration, BenchError> {
    let path = folder.join("sync.probe");
    let mut file = std::fs::File::create(&path).map_err(BenchError::file(&path))?;
    let bytes = vec![7_u8; bytes];
    if preallocated {
        // Written, not only promised: a first write into promised space changes the file system's books.
        let space = vec![0_u8; bytes.len() * APPENDS];
        file.write_all(&space)
            .and_then(|()| file.sync_all())
            .and_then(|()| file.rewind())
            .map_err(BenchError::file(&path))?;
    }
    let mut times = Vec::with_capacity(APPENDS);
    for _ in 0..APPENDS {
        let began = Instant::now();
        file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(BenchError::file(&path))?;
        times.push(began.elapsed());
    }
    std::fs::remove_file(&path).map_err(BenchError::file(&path))?;
    times.sort();
    Ok(times[APPENDS / 2])
}

fn file(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn printed(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

/// The one-minute load average: others may use the machine.
pub fn load() -> String {
    file("/proc/loadavg").split(' ').next().unwrap_or("?").to_owned()
}

/// Processor, memory, kernel, in one line.
pub fn facts() -> String {
    let cpuinfo = file("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("");
    let model = model.trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = file("/proc/meminfo");
    let kib: u64 = memory
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse().ok())
        .unwrap_or(0);
    let kernel = file("/proc/sys/kernel/osrelease");
    format!("{cores} × {model}, {} GiB, Linux {}", kib >> 20, kernel.trim())
}

/// The date, in UTC.
pub fn date() -> String {
    printed("date", &["-u", "+%Y-%m-%d %H:%M UTC"])
}

/// etcd's own words on its version.
pub fn etcd_version(program: &Path) -> String {
    let text = printed(&program.to_string_lossy(), &["--version"]);
    text.lines().next().unwrap_or("etcd").to_owned()
}
