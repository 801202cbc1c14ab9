//! Many seeds, each in a process of its own, a few at a time.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::command_line::HAPPENED;
use crate::happened::Happened;
use crate::machine;
use crate::tally::Tally;

/// How long one seed may take on the real clock before it counts as hung.
const SEED_DEADLINE: Duration = Duration::from_secs(300);
/// Between two looks at a running seed.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Processes at a time, where the machine has as many processors.
const PROCESSES_MAX: usize = 2;

/// Which seeds to run, and how.
pub(crate) struct ManySeeds<'a> {
    pub(crate) from: u64,
    pub(crate) seeds: u64,
    pub(crate) plant: Option<&'a str>,
    /// Whether to begin no further seed once one failed.
    pub(crate) until_failure: bool,
}

#[derive(Default)]
struct Results {
    ran: u64,
    failed: Vec<u64>,
    tally: Tally,
    happened: Happened,
}

impl ManySeeds<'_> {
    /// Runs them, and says which failed. Answers whether none did.
    pub(crate) fn run(&self) -> Result<bool, String> {
        let program =
            std::env::current_exe().map_err(|error| format!("this program has no path: {error}"))?;
        let (began, cpu_before) = (Instant::now(), machine::children_cpu());
        let next = AtomicU64::new(self.from);
        let stop = AtomicBool::new(false);
        let results = Mutex::new(Results::default());
        let processes = std::thread::available_parallelism().map_or(1, usize::from).min(PROCESSES_MAX);
        let worked: Vec<Result<(), String>> = std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..processes).map(|_| scope.spawn(|| self.work(&program, &next, &stop, &results))).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or(Err("a worker panicked".to_owned())))
                .collect()
        });
        worked.into_iter().collect::<Result<(), String>>()?;
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.failed.sort_unstable();
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
        println!(
            "{} seeds in {:.1} s, {:.1} s of CPU, {} failed{}: {}",
            results.ran,
            began.elapsed().as_secs_f32(),
            machine::children_cpu().saturating_sub(cpu_before).as_secs_f32(),
            results.failed.len(),
            list(&results.failed),
            results.tally
        );
        println!("what happened: {}", results.happened);
        Ok(results.failed.is_empty())
    }

    fn work(
        &self,
        program: &Path,
        next: &AtomicU64,
        stop: &AtomicBool,
        results: &Mutex<Results>,
    ) -> Result<(), String> {
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= self.from.saturating_add(self.seeds) {
                break;
            }
            let mut command = Command::new(program);
            command.args(["--seed", &seed.to_string()]);
            if let Some(bug) = self.plant {
                command.args(["--plant", bug]);
            }
            let output = finish(&mut command).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
            let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
            results.ran += 1;
            results.tally.add(output.tally());
            results.happened.add(&output.happened());
            if output.failed {
                results.failed.push(seed);
                stop.fetch_or(self.until_failure, Ordering::Relaxed);
                println!("{}    again: {}", output.text, again(seed, self.plant));
            }
            if std::io::stderr().is_terminal() {
                eprint!("\r\x1b[K{} of {} seeds", results.ran, self.seeds);
                let _ = std::io::stderr().flush();
            }
        }
        Ok(())
    }
}

fn again(seed: u64, plant: Option<&str>) -> String {
    match plant {
        Some(bug) => format!("cargo xtask sim --plant {bug} --seed {seed}"),
        None => format!("cargo xtask sim --seed {seed} --trace trace.txt"),
    }
}

fn list(failed: &[u64]) -> String {
    let numbers: Vec<String> = failed.iter().map(u64::to_string).collect();
    if numbers.is_empty() { String::new() } else { format!(" ({})", numbers.join(", ")) }
}

struct Output {
    failed: bool,
    text: String,
}

impl Output {
    /// What the run counted: it says so after its number.
    fn tally(&self) -> Tally {
        let line = self.text.lines().next().unwrap_or_default();
        Tally::read(line.split_once(": ").map_or("", |(_, counts)| counts))
    }

    /// How often each kind of thing happened.
    fn happened(&self) -> Happened {
        let told = self.text.lines().find_map(|line| line.split_once(HAPPENED));
        told.map_or_else(Happened::default, |(_, counts)| Happened::read(counts))
    }
}

/// Runs a seed to its end. It writes little, so nobody has to read meanwhile.
fn finish(command: &mut Command) -> Result<Output, String> {
    let cannot = |error: std::io::Error| format!("a seed could not be run: {error}");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().map_err(cannot)?;
    let began = Instant::now();
    loop {
        if child.try_wait().map_err(cannot)?.is_some() {
            let output = child.wait_with_output().map_err(cannot)?;
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            if !output.status.success() && !text.contains("FAILED") {
                text.push_str(&format!("FAILED: it ended with {}\n", output.status));
            }
            return Ok(Output { failed: !output.status.success(), text });
        }
        if began.elapsed() > SEED_DEADLINE {
            child.kill().map_err(cannot)?;
            child.wait().map_err(cannot)?;
            return Ok(Output { failed: true, text: "FAILED: it hung\n".to_owned() });
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
