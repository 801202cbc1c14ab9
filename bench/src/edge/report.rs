//! The comparison: rounds in which each has its turn, medians with their spread, and ratios to the better of the others.

use crate::Outcome;
use crate::load::{Counted, Load, with_backend};
use crate::peers::Peer;
use clap::Args;
use holdfast_bench::process::Process;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The generator's core; the proxy has the other.
const CORE: usize = 1;
/// Clients that come and go at a time.
const COMING: usize = 32;
/// Connections of bulk.
const BULK: usize = 8;
/// Connections of the small echo.
const ECHOING: usize = 8;
/// How long each load runs before it is counted.
const WARM_UP: Duration = Duration::from_millis(300);

/// What is compared, and for how long.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// The folder for the proxies' files; it is made and removed.
    #[arg(long)]
    folder: PathBuf,
    /// How often each has its turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each load is counted.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Idle connections whose memory is looked at.
    #[arg(long, default_value_t = 5_000)]
    idle: usize,
}

/// Values of each figure by who has them, a value a round. Figures keep the order of [`FIGURES`].
type Values = BTreeMap<(usize, &'static str), Vec<f64>>;

/// What is shown: name, whether less is better, and the target as a factor of the better of the others.
const FIGURES: [(&str, bool, Option<f64>); 10] = [
    ("new connections/s", false, Some(1.2)),
    ("CPU µs per new connection", true, Some(0.75)),
    ("the proxy's core in use meanwhile, %", true, None),
    ("bulk MiB/s, 8 connections", false, Some(1.2)),
    ("CPU µs per MiB", true, Some(0.5)),
    ("the proxy's core in use meanwhile, %", true, None),
    ("CPU µs per small exchange, as many as it can", true, None),
    ("added latency of an echo at half load, p50 µs", true, Some(1.0)),
    ("the same, p99 µs", true, Some(1.0)),
    ("memory per idle connection, KiB", true, Some(0.5)),
];

/// Runs the comparison and prints it.
pub(crate) fn compare(plan: &Plan) -> Outcome<()> {
    let mut core = CpuSet::new();
    core.set(CORE);
    sched_setaffinity(None, &core)?;
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
    std::fs::create_dir_all(&plan.folder)?;
    // nginx looks for a relative path inside its own folder.
    let folder = plan.folder.canonicalize()?;
    let values = with_backend(async |backend, load| rounds(plan, &folder, backend, &*load).await);
    std::fs::remove_dir_all(&plan.folder)?;
    print(&values?);
    Ok(())
}

async fn rounds(
    plan: &Plan,
    data: &Path,
    backend: SocketAddr,
    load: &dyn Fn(SocketAddr) -> Load,
) -> Outcome<Values> {
    let mut values = Values::new();
    let window = Duration::from_secs_f64(plan.seconds);
    let mut rate = f64::INFINITY;
    for round in 0..plan.rounds {
        let mut peers = Peer::ALL;
        peers.rotate_left(round % Peer::ALL.len());
        if round == 0 {
            // Half of what the slowest can, for all of them and in all rounds.
            for peer in peers {
                let (process, load) = start(&data.join("peak"), peer, backend, load)?;
                let peak =
                    counted(&process, async |time| load.exchanges(ECHOING, time).await, window).await?.0;
                rate = rate.min(peak.units / peak.seconds / 2.0);
            }
            eprintln!("half load is {rate:.0} exchanges/s");
        }
        let direct = load(backend).latencies(ECHOING, rate, window).await?;
        let (p50, p99) = (direct.value_at_quantile(0.5), direct.value_at_quantile(0.99));
        eprintln!(
            "without a proxy: p50 {:.1} µs, p99 {:.1} µs of {}",
            p50 as f64 / 1e3,
            p99 as f64 / 1e3,
            direct.len()
        );
        for peer in peers {
            let folder = data.join(format!("{round}-{}", peer.name()));
            let (process, load) = start(&folder, peer, backend, load)?;
            let mut note = |figure: usize, value: f64| {
                values.entry((figure, peer.name())).or_default().push(value);
            };
            // First, in a process that has served nobody yet.
            let before = process.memory().0;
            let idle = load.idle(plan.idle).await?;
            let after = process.memory().0;
            note(9, after.saturating_sub(before) as f64 / 1024.0 / idle.len() as f64);
            drop(idle);
            drop(process);

            let (process, load) = start(&folder.join("fresh"), peer, backend, &|proxy| load.through(proxy))?;
            let (came, cpu) =
                counted(&process, async |time| load.connections(COMING, time).await, window).await?;
            note(0, came.units / came.seconds);
            note(1, cpu * 1e6 / came.units);
            note(2, cpu * 100.0 / came.seconds);
            let (moved, cpu) = counted(&process, async |time| load.bulk(BULK, time).await, window).await?;
            note(3, moved.units / moved.seconds);
            note(4, cpu * 1e6 / moved.units);
            note(5, cpu * 100.0 / moved.seconds);
            let (said, cpu) =
                counted(&process, async |time| load.exchanges(ECHOING, time).await, window).await?;
            note(6, cpu * 1e6 / said.units);
            let latencies = load.latencies(ECHOING, rate, window).await?;
            for (figure, quantile) in [(7, 0.5), (8, 0.99)] {
                let (through, without) =
                    (latencies.value_at_quantile(quantile), direct.value_at_quantile(quantile));
                note(figure, (through as f64 - without as f64) / 1e3);
            }
            eprintln!("round {} of {}: {}", round + 1, plan.rounds, peer.name());
        }
    }
    Ok(values)
}

/// Starts a proxy on a port that is free.
fn start(
    folder: &Path,
    peer: Peer,
    backend: SocketAddr,
    load: &dyn Fn(SocketAddr) -> Load,
) -> Outcome<(Process, Load)> {
    let listens = std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?.local_addr()?;
    let folder = folder.join(peer.name());
    Ok((peer.start(&folder, listens, backend)?, load(listens)))
}

/// What `run` counted after a warm-up, and the CPU seconds that the proxy spent meanwhile.
async fn counted(
    process: &Process,
    run: impl AsyncFn(Duration) -> Outcome<Counted>,
    window: Duration,
) -> Outcome<(Counted, f64)> {
    run(WARM_UP).await?;
    let before = process.cpu();
    let counted = run(window).await?;
    let cpu = process.cpu().saturating_sub(before).as_secs_f64();
    if counted.units == 0.0 {
        return Err(format!("{} carried nothing", process.name()).into());
    }
    Ok((counted, cpu))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn shown(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} ({}–{})", figure(median(values)), figure(least), figure(greatest))
}

fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn print(values: &Values) {
    println!(
        "| figure | target | holdfast | haproxy | nginx | ratio to the better | met |\n|---|---|---|---|---|---|---|"
    );
    for (nth, (name, less, target)) in FIGURES.iter().enumerate() {
        let of = |peer: Peer| values.get(&(nth, peer.name())).map_or(&[][..], Vec::as_slice);
        let [ours, haproxy, nginx] = Peer::ALL.map(|peer| median(of(peer)));
        // The memory target names HAProxy alone.
        let better = match (nth, less) {
            (9, _) => haproxy,
            (_, true) => haproxy.min(nginx),
            (_, false) => haproxy.max(nginx),
        };
        // What is added to a latency may be less than nothing, within the noise; then only which is less has a meaning.
        let ratio = if better > 0.0 { format!("{:.2}×", ours / better) } else { "–".to_owned() };
        let (sign, is_met) = match target {
            None => (String::new(), None),
            Some(factor) if *less => (format!("≤ {factor}×"), Some(ours <= factor * better)),
            Some(factor) => (format!("≥ {factor}×"), Some(ours >= factor * better)),
        };
        let met = match is_met {
            None => "",
            Some(true) => "yes",
            Some(false) => "**no**",
        };
        let [ours, haproxy, nginx] = Peer::ALL.map(|peer| shown(of(peer)));
        println!("| {name} | {sign} | {ours} | {haproxy} | {nginx} | {ratio} | {met} |");
    }
}
