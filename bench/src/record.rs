//! A run's section of `docs/benchmarks.md`: what was measured, on what, by which command, and what came of it.

use crate::report::{self, Found};
use crate::{Arguments, machine};
use holdfast_bench::error::BenchError;
use std::fmt;
use std::path::Path;
use std::time::Instant;

/// What a run begins with.
pub struct Head {
    date: String,
    revision: String,
    machine: String,
    etcd: String,
    load: String,
    began: Instant,
}

impl Head {
    /// As things stand now.
    pub fn now(arguments: &Arguments) -> Head {
        Head {
            date: machine::date(),
            revision: arguments.revision.clone().unwrap_or_else(|| "not known".into()),
            machine: machine::facts(),
            etcd: machine::etcd_version(&arguments.etcd),
            load: machine::load(),
            began: Instant::now(),
        }
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, commit {}: {}; {}; load average {}",
            self.date, self.revision, self.machine, self.etcd, self.load
        )
    }
}

/// The section, in Markdown: the targets first, everything else folded away.
pub fn section(head: &Head, arguments: &Arguments, found: &Found) -> String {
    let minutes = head.began.elapsed().as_secs_f64() / 60.0;
    let mut text = format!(
        "\n## {}, commit {}\n\n{}; {}. `{}`: {minutes:.1} minutes, load average {} at the start and {} at the end.\n\n",
        head.date,
        head.revision,
        head.machine,
        head.etcd,
        command(arguments),
        head.load,
        machine::load(),
    );
    for failure in &found.failed.all {
        text.push_str(&format!("- **Failed**: {}\n", failure.replace('\n', " ")));
    }
    if !found.failed.all.is_empty() {
        text.push('\n');
    }
    text.push_str(&report::targets(found, arguments.events));
    text.push_str(&format!("{FOLDED}\n\n"));
    text.push_str(&report::appends(&found.appends));
    text.push_str(&report::loads(&found.ours, &found.theirs));
    text.push_str(&report::others(&found.ours, &found.theirs));
    text.push_str(&format!("\n{UNFOLDED}\n"));
    text
}

/// The command as it was run, without this machine's paths. Every flag that changes what is measured is in it.
fn command(arguments: &Arguments) -> String {
    let list = |all: &[String]| all.join(",");
    let clients: Vec<_> = arguments.clients.iter().map(usize::to_string).collect();
    let rates: Vec<_> = arguments.rates.iter().map(u64::to_string).collect();
    let program = match arguments.revision {
        Some(_) => "cargo xtask bench raft",
        None => "bench-raft --holdfast BINARY --folder FOLDER",
    };
    let mixed: Vec<_> = arguments.mixed_clients.iter().map(usize::to_string).collect();
    let mut text = format!("{program} --rounds {} --seconds {}", arguments.rounds, arguments.seconds);
    if !arguments.only.is_empty() {
        text.push_str(&format!(" --only {}", arguments.only.join(",")));
    }
    // A flag of a part that was not run changed nothing.
    let flags: [(&[&str], String); 7] = [
        (&["writes", "reads"], format!(" --clients {}", list(&clients))),
        (&["mixed"], format!(" --mixed-clients {}", list(&mixed))),
        (&["open"], format!(" --rates {}", list(&rates))),
        (&["watch"], format!(" --watchers {} --watch-rate {}", arguments.watchers, arguments.watch_rate)),
        (&["failover"], format!(" --kills {} --etcd-kills {}", arguments.kills, arguments.etcd_kills)),
        (&["restart", "rebuild", "memory"], format!(" --events {}", arguments.events)),
        (&["memory"], format!(" --instances {}", arguments.instances)),
    ];
    for (parts, flag) in flags {
        if parts.iter().any(|part| arguments.wants(part)) {
            text.push_str(&flag);
        }
    }
    if let Some(system) = &arguments.system {
        text.push_str(&format!(" --system {system}"));
    }
    text
}

/// Where sections of runs begin in a record.
const SECTION: &str = "\n## 2";
/// What is folded away begins so.
const FOLDED: &str = "<details><summary>All figures: median (least–greatest) of the rounds</summary>";
/// And ends so.
const UNFOLDED: &str = "</details>";

/// Writes a section into a record, before those that it has.
pub fn write(record: &Path, section: &str) -> Result<(), BenchError> {
    let text = match std::fs::read_to_string(record) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(BenchError::file(record)(error)),
    };
    std::fs::write(record, newest_first(&text, section)).map_err(BenchError::file(record))
}

/// The text with a section before those that it has. Older ones keep their targets; all their figures are in the history of
/// the repository.
fn newest_first(text: &str, section: &str) -> String {
    let (before, after) = text.split_at(text.find(SECTION).unwrap_or(text.len()));
    let (mut kept, mut rest) = (String::new(), after);
    while let Some((shown, folded)) = rest.split_once(FOLDED) {
        kept.push_str(shown.trim_end());
        kept.push('\n');
        rest = folded.split_once(UNFOLDED).map_or("", |(_, rest)| rest.trim_start_matches('\n'));
        if !rest.is_empty() {
            kept.push('\n');
        }
    }
    format!("{before}{section}{kept}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn a_record_names_the_command_that_ran_and_no_revision_that_is_not_known() {
        let parse = |more: &[&str]| {
            let given =
                ["bench-raft", "--holdfast", "/x/h", "--folder", "/x/f", "--clients", "1,64", "--rates", "5"];
            command(&Arguments::parse_from(given.iter().chain(more)))
        };
        let direct = parse(&["--only", "writes,open"]);
        assert!(direct.starts_with("bench-raft --holdfast BINARY") && !direct.contains("/x"), "{direct}");
        assert!(
            direct.contains("--only writes,open --clients 1,64 --rates 5") && !direct.contains("--kills"),
            "{direct}"
        );
        assert!(parse(&["--revision", "abc"]).starts_with("cargo xtask bench raft --rounds 3"));
    }

    #[test]
    fn a_run_is_written_before_those_that_came_earlier() {
        let page = "# Benchmarks\n\n## How\n\nSo.\n\n## 2026-01-01\n\nold\n";
        let written = newest_first(page, "\n## 2026-01-02\n\nnew\n");
        assert_eq!(
            written,
            "# Benchmarks\n\n## How\n\nSo.\n\n## 2026-01-02\n\nnew\n\n## 2026-01-01\n\nold\n"
        );
        assert_eq!(newest_first("", "\n## 2026\n"), "\n## 2026\n");
        let old =
            format!("x\n\n## 2026-01-01\n\ntargets\n\n{FOLDED}\n\nmuch\n\n{UNFOLDED}\n\n## 2025\n\nolder\n");
        let wanted = "x\n\n## 2026-02\n\nnew\n\n## 2026-01-01\n\ntargets\n\n## 2025\n\nolder\n";
        assert_eq!(newest_first(&old, "\n## 2026-02\n\nnew\n"), wanted);
    }

    #[test]
    fn a_section_says_what_failed_and_what_was_measured() {
        let arguments =
            Arguments::parse_from(["bench-raft", "--holdfast", "h", "--folder", "f", "--revision", "abc"]);
        let mut found = Found::default();
        found.failed.note("etcd, watchers: too slow".into());
        let text = section(&Head::now(&arguments), &arguments, &found);
        assert!(
            text.contains(", commit abc\n") && text.contains("`cargo xtask bench raft --rounds 3"),
            "{text}"
        );
        assert!(text.contains("- **Failed**: etcd, watchers: too slow\n"), "{text}");
        assert!(
            text.contains("| leader killed → first accepted write, median | ≤ 1 s | – | not measured |"),
            "{text}"
        );
    }
}
