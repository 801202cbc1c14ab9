//! What an append to the log costs: time until it is durable, and CPU, with one entry at a time and with many.
//!
//! `cargo run --release -p holdfast-raft --example log_append FOLDER [APPENDS]`. The folder lies on the disk to be measured.

use holdfast_model::MemberId;
use holdfast_raft::MemberIdentity;
use holdfast_raft::log_store::LogStore;
use holdfast_raft::types::{Entry, LeaderId, LogCommand, LogId, TypeConfig};
use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// As in the binary.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Appends of each run, unless told.
const APPENDS: u64 = 5000;
/// Bytes of a command: about those of «create an app».
const COMMAND_BYTES: usize = 256;
/// Entries of one append.
const ENTRIES: [u64; 2] = [1, 64];
/// What `/proc` counts CPU time in.
const TICK: Duration = Duration::from_millis(10);

/// CPU time of this process, all threads.
fn cpu() -> Result<Duration, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks =
        after_name.split_whitespace().skip(11).take(2).map(str::parse::<u32>).sum::<Result<u32, _>>()?;
    Ok(TICK * ticks)
}

fn entry(index: u64) -> Result<Entry, Box<dyn Error>> {
    let command = LogCommand::from_wire(vec![b'x'; COMMAND_BYTES].into())?;
    let log_id = LogId::new(LeaderId { term: 1, node_id: 1 }, index);
    Ok(Entry { log_id, payload: EntryPayload::Normal(command) })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("name a folder on the disk to be measured")?);
    let appends = arguments.next().map_or(Ok(APPENDS), |text| text.parse())?;
    for entries in ENTRIES {
        let log_folder = folder.join(format!("log-append-{entries}"));
        std::fs::create_dir_all(&log_folder)?;
        let identity = MemberIdentity { cluster: "bench".to_owned(), member: MemberId(1), incarnation: 1 };
        let mut log = LogStore::create(&log_folder.join("log.redb"), &identity)?;
        let mut next = 0;
        let mut times = Vec::new();
        let cpu_before = cpu()?;
        for _ in 0..appends {
            let new = (next..next + entries).map(entry).collect::<Result<Vec<_>, _>>()?;
            next += entries;
            let began = Instant::now();
            let (done, answer) = TypeConfig::oneshot();
            log.append(new, IOFlushed::signal(done)).await?;
            answer.await??;
            times.push(began.elapsed());
        }
        let cpu = cpu()? - cpu_before;
        times.sort();
        let at = |share: usize| times[(times.len() - 1) * share / 1000].as_micros();
        println!(
            "{entries} entries an append: p50 {} µs, p99 {} µs, p99.9 {} µs, {:.0} µs of CPU an append",
            at(500),
            at(990),
            at(999),
            cpu.as_secs_f64() * 1e6 / appends as f64
        );
        drop(log);
        std::fs::remove_dir_all(&log_folder)?;
    }
    Ok(())
}
