//! Medians, spread, ratios and targets, as tables for people and for `docs/benchmarks.md`.

use crate::failover::Failover;
use crate::load::{Measured, Mix, Pace, Scenario};
use crate::long::{REBUILD_FILE, REBUILD_TO, RESTART_TERM};
use crate::machine::BARE_APPENDS;
use crate::system::MEMBERS;
use holdfast_bench::error::BenchError;
use std::fmt::Write;
use std::time::Duration;

/// All that a run came to.
#[derive(Default)]
pub struct Found {
    /// Holdfast's figures.
    pub ours: Results,
    /// etcd's.
    pub theirs: Results,
    /// Bare appends with fdatasync on the same disk, in milliseconds, by their kind.
    pub appends: Vec<(&'static str, Vec<f64>)>,
    /// What could not be measured.
    pub failed: Failed,
}

/// What could not be measured, and why. One part's failure takes nothing from the others.
#[derive(Default)]
pub struct Failed {
    /// Each with its error.
    pub all: Vec<String>,
}

impl Failed {
    /// Does a piece of work that may take so long, and notes its failure.
    pub async fn tried<T>(
        &mut self,
        what: &str,
        most: Duration,
        work: impl Future<Output = Result<T, BenchError>>,
    ) -> Option<T> {
        let late = Err(BenchError::Late { seconds: most.as_secs() });
        match tokio::time::timeout(most, work).await.unwrap_or(late) {
            Ok(done) => Some(done),
            Err(error) => {
                self.note(format!("{what}: {}", error.told()));
                None
            }
        }
    }

    /// Notes a failure.
    pub fn note(&mut self, what: String) {
        println!("  FAILED: {what}");
        self.all.push(what);
    }

    /// Notes an outcome that is a failure.
    pub fn done(&mut self, outcome: Result<(), BenchError>) {
        if let Err(error) = outcome {
            self.note(error.told());
        }
    }
}

/// What one system came to, over all rounds.
#[derive(Default)]
pub struct Results {
    /// Each scenario with what each round measured, in the order of the first round.
    pub loads: Vec<(Scenario, Vec<Measured>)>,
    /// Every kill of a leader.
    pub failovers: Vec<Failover>,
    /// Resident memory of the three members and disk of their folders at the end of each round, in bytes.
    pub ends: Vec<(u64, u64)>,
    /// Whatever else was measured: of what, which figure with its unit, and each measurement.
    pub others: Vec<(String, &'static str, Vec<f64>)>,
}

impl Results {
    /// Adds a round's measurement.
    pub fn add(&mut self, scenario: Scenario, measured: Measured) {
        match self.loads.iter_mut().find(|(known, _)| *known == scenario) {
            Some((_, all)) => all.push(measured),
            None => self.loads.push((scenario, vec![measured])),
        }
    }

    /// Adds a measurement of something else.
    pub fn note(&mut self, what: &str, figure: &'static str, value: f64) {
        match self.others.iter_mut().find(|(w, f, _)| w == what && *f == figure) {
            Some((.., all)) => all.push(value),
            None => self.others.push((what.to_owned(), figure, vec![value])),
        }
    }

    fn noted(&self, what: &str, figure: &str) -> &[f64] {
        self.others.iter().find(|(w, f, _)| w == what && *f == figure).map_or(&[], |(.., all)| all)
    }

    /// A time of each kill, in milliseconds.
    fn kills(&self, pick: fn(&Failover) -> Duration) -> Vec<f64> {
        self.failovers.iter().map(|f| pick(f).as_secs_f64() * 1e3).collect()
    }

    fn of(&self, scenario: Scenario) -> &[Measured] {
        self.loads.iter().find(|(known, _)| *known == scenario).map_or(&[], |(_, all)| all)
    }
}

/// Median, least and greatest.
fn spread(values: impl Iterator<Item = f64>) -> Option<(f64, f64, f64)> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (first, last) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median =
        if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
    Some((median, first, last))
}

fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

fn cell(values: impl Iterator<Item = f64>, scale: f64) -> String {
    match spread(values.map(|v| v * scale)) {
        Some((median, least, most)) if least == most => number(median),
        Some((median, least, most)) => format!("{} ({}–{})", number(median), number(least), number(most)),
        None => "–".into(),
    }
}

fn ratio(ours: impl Iterator<Item = f64>, theirs: impl Iterator<Item = f64>) -> String {
    match (spread(ours), spread(theirs)) {
        (Some((ours, ..)), Some((theirs, ..))) if theirs > 0.0 => format!("{:.2}×", ours / theirs),
        _ => "–".into(),
    }
}

/// Of a round's memory and disk, which, under which name.
type End = (&'static str, fn(&(u64, u64)) -> u64);
type Figure = (&'static str, f64, fn(&Measured) -> Option<f64>);

/// What each scenario is judged by; a figure's scale makes its unit.
const FIGURES: [Figure; 8] = [
    ("ops/s", 1.0, |m| Some(m.rate)),
    ("p50 ms", 1e-3, |m| Some(m.p50_us)),
    ("p99 ms", 1e-3, |m| Some(m.p99_us)),
    ("CPU µs/op, members", 1.0, |m| Some(m.cpu_us)),
    ("leader", 1.0, |m| Some(m.leader_cpu_us)),
    ("each follower", 1.0, |m| Some(m.follower_cpu_us)),
    ("generator", 1.0, |m| Some(m.own_cpu_us)),
    ("fsyncs/op, one member", 1.0 / MEMBERS as f64, |m| m.syncs),
];

/// Every load, three rows each.
pub fn loads(ours: &Results, theirs: &Results) -> String {
    let mut text = String::from("| load | |");
    for (name, ..) in FIGURES {
        text.push_str(&format!(" {name} |"));
    }
    text.push_str(&format!(" errors |\n|---|---|{}---|\n", "---|".repeat(FIGURES.len())));
    let none = text.clone();
    let only_theirs = theirs.loads.iter().map(|(s, _)| s).filter(|s| ours.of(**s).is_empty());
    for scenario in ours.loads.iter().map(|(s, _)| s).chain(only_theirs) {
        let sides = [("holdfast", ours.of(*scenario)), ("etcd", theirs.of(*scenario))];
        for (place, (system, all)) in sides.into_iter().enumerate() {
            let load = if place == 0 { scenario.name() } else { String::new() };
            text.push_str(&format!("| {load} | {system} |"));
            for (_, scale, figure) in FIGURES {
                text.push_str(&format!(" {} |", cell(all.iter().filter_map(figure), scale)));
            }
            text.push_str(&format!(" {} |\n", all.iter().map(|m| m.errors).sum::<u64>()));
        }
        text.push_str("| | ratio |");
        for (.., figure) in FIGURES {
            let [(_, a), (_, b)] = sides;
            text.push_str(&format!(" {} |", ratio(a.iter().filter_map(figure), b.iter().filter_map(figure))));
        }
        text.push_str(" |\n");
    }
    if text == none { String::new() } else { text + "\n" }
}

/// Everything that is no load: failovers, watches, long histories, sizes.
pub fn others(ours: &Results, theirs: &Results) -> String {
    let mut text = String::from("| | figure | holdfast | etcd | ratio |\n|---|---|---|---|---|\n");
    let none = text.clone();
    let mut row = |what: &str, figure: &str, a: Vec<f64>, b: Vec<f64>| {
        let (a, b) = (a.into_iter(), b.into_iter());
        let cells = (cell(a.clone(), 1.0), cell(b.clone(), 1.0));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {what} | {figure} | {} | {} | {} |", cells.0, cells.1, ratio(a, b));
    };
    let names = ["leader killed → first accepted write", "killed member started → serves"];
    let picks: [fn(&Failover) -> Duration; 2] = [|f| f.outage, |f| f.restart];
    for (name, pick) in names.into_iter().zip(picks) {
        let (a, b) = (ours.kills(pick), theirs.kills(pick));
        if !a.is_empty() || !b.is_empty() {
            row(&format!("{name}, {} and {} times", a.len(), b.len()), "ms", a, b);
        }
    }
    let known = |(what, figure, _): &&(String, &'static str, Vec<f64>)| ours.noted(what, figure).is_empty();
    let mut before = "";
    for (what, figure, _) in ours.others.iter().chain(theirs.others.iter().filter(known)) {
        let shown = if before == what { "" } else { what };
        row(shown, figure, ours.noted(what, figure).to_vec(), theirs.noted(what, figure).to_vec());
        before = what;
    }
    let picks: [End; 2] = [
        ("memory after all loads, three members", |e| e.0),
        ("disk after all loads, three members", |e| e.1),
    ];
    for (name, pick) in picks {
        let ends = |results: &Results| -> Vec<f64> {
            results.ends.iter().map(|end| pick(end) as f64 / f64::from(1 << 20)).collect()
        };
        if !ours.ends.is_empty() || !theirs.ends.is_empty() {
            row(name, "MiB", ends(ours), ends(theirs));
        }
    }
    if text == none { String::new() } else { text }
}

/// What is to be reached, and how much; what was measured, and whether that is enough.
type Target = ((&'static str, &'static str), (String, Option<bool>));

/// What was asked of this benchmark, with what came of it.
pub fn targets(found: &Found, events: u64) -> String {
    let (ours, theirs) = (&found.ours, &found.theirs);
    let closed = |mix, clients| Scenario { mix, pace: Pace::Closed(clients) };
    let of = |results: &Results, scenario, figure: fn(&Measured) -> Option<f64>| {
        spread(results.of(scenario).iter().filter_map(figure)).map(|s| s.0)
    };
    let beside = |scenario, figure: fn(&Measured) -> Option<f64>, unit: &str| {
        let (a, b) = (of(ours, scenario, figure)?, of(theirs, scenario, figure)?);
        (b > 0.0).then(|| (a / b, format!("{}{unit} / {}{unit} = {:.2}×", number(a), number(b), a / b)))
    };
    let judged = |measured: Option<(f64, String)>, enough: fn(f64) -> bool| match measured {
        Some((value, text)) => (text, Some(enough(value))),
        None => ("–".to_owned(), None),
    };
    let noted = |what: String, figure: &str, unit: &str| {
        spread(ours.noted(&what, figure).iter().copied()).map(|s| (s.0, format!("{}{unit}", number(s.0))))
    };
    let (one, many) = (closed(Mix::Write, 1), closed(Mix::Write, 256));
    let bare = found.appends.iter().find(|(what, _)| *what == BARE_APPENDS[1].2);
    let bare = bare.and_then(|(_, times)| spread(times.iter().copied())).map(|s| s.0);
    let over_bare = of(ours, one, |m| Some(m.p50_us / 1e3)).zip(bare).map(|(took, bare)| {
        (took / bare, format!("{} ms / {} ms = {:.1}×", number(took), number(bare), took / bare))
    });
    let outages = spread(ours.kills(|f| f.outage).into_iter());
    let number_of_kills = ours.failovers.len();
    let syncs = of(ours, many, |m| m.syncs).map(|syncs| syncs * 100.0 / MEMBERS as f64);
    let rows: [Target; 11] = [
        (("writes/s, 256 clients", "≥ 5× etcd"), judged(beside(many, |m| Some(m.rate), ""), |v| v >= 5.0)),
        (("their p99", "≤ 0.33× etcd"), judged(beside(many, |m| Some(m.p99_us / 1e3), " ms"), |v| v <= 0.33)),
        (
            ("write latency (p50), 1 client", "≤ 0.6× etcd"),
            judged(beside(one, |m| Some(m.p50_us / 1e3), " ms"), |v| v <= 0.6),
        ),
        (("the same", "≤ 2.5× a bare append of 4 KiB + fdatasync"), judged(over_bare, |v| v <= 2.5)),
        (
            ("linearizable reads/s, 64 clients, any member", "≥ 5× etcd"),
            judged(beside(closed(Mix::Read, 64), |m| Some(m.rate), ""), |v| v >= 5.0),
        ),
        (
            ("leader killed → first accepted write, median", "≤ 1 s"),
            judged(outages.map(|s| (s.0, format!("{:.0} ms", s.0))), |v| v <= 1e3),
        ),
        (
            ("the same, worst", "≤ 3 s of 30"),
            judged(outages.map(|s| (s.2, format!("{:.0} ms of {number_of_kills}", s.2))), |v| v <= 3e3),
        ),
        (
            ("restart with 1 M events and a current checkpoint", "≤ 2 s to serving"),
            judged(noted(crate::long::restarted(events), RESTART_TERM, " s"), |v| v <= 2.0),
        ),
        (
            ("rebuild of all views, in memory", "≥ 500,000 events/s"),
            judged(noted(crate::long::rebuilt(events), REBUILD_TO, ""), |v| v >= 5e5),
        ),
        (
            ("the same, written into the file", "≥ 500,000 events/s"),
            judged(noted(crate::long::rebuilt(events), REBUILD_FILE, ""), |v| v >= 5e5),
        ),
        (
            ("fsyncs of a member per 100 commands, 256 clients", "≤ 1"),
            judged(syncs.map(|v| (v, number(v))), |v| v <= 1.0),
        ),
    ];
    let mut text =
        String::from("| figure | target | measured (holdfast / etcd) | met |\n|---|---|---|---|\n");
    for ((what, target), (measured, met)) in rows {
        let met = match met {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "not measured",
        };
        let _ = writeln!(text, "| {what} | {target} | {measured} | {met} |");
    }
    text.push('\n');
    text
}

/// Bare appends with fdatasync on the same disk, in milliseconds.
pub fn appends(measured: &[(&'static str, Vec<f64>)]) -> String {
    if measured.is_empty() {
        return String::new();
    }
    let mut text = String::from("| bare append + fdatasync | median ms |\n|---|---|\n");
    for (what, times) in measured {
        let _ = writeln!(text, "| {what} | {} |", cell(times.iter().copied(), 1.0));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_spread_and_ratios_are_those_of_all_rounds() {
        let scenario = Scenario { mix: Mix::Write, pace: Pace::Closed(64) };
        let (mut ours, mut theirs) = (Results::default(), Results::default());
        for rate in [900.0, 3000.0, 1000.0] {
            ours.add(scenario, Measured { rate, ..Measured::default() });
        }
        for rate in [400.0, 600.0] {
            theirs.add(scenario, Measured { rate, ..Measured::default() });
        }
        let text = loads(&ours, &theirs);
        assert!(text.contains("| write, 64 clients | holdfast | 1000 (900–3000) | 0.00 |"), "{text}");
        assert!(text.contains("|  | etcd | 500 (400–600) | 0.00 |"), "{text}");
        assert!(text.contains("| | ratio | 2.00× | – |"), "{text}");
        assert!(text.contains("| – | 0 |"), "what was not counted is not shown as 0 fsyncs: {text}");
        assert_eq!(others(&ours, &theirs), "");
    }

    #[test]
    fn a_target_is_met_missed_or_not_measured() {
        let mut found = Found::default();
        let many = Scenario { mix: Mix::Write, pace: Pace::Closed(256) };
        let one = Scenario { mix: Mix::Write, pace: Pace::Closed(1) };
        let load = |rate, p50_us, syncs| Measured { rate, p50_us, syncs, ..Measured::default() };
        found.ours.add(many, load(5000.0, 9.0, Some(0.06)));
        found.theirs.add(many, load(1000.0, 9.0, None));
        found.ours.add(one, load(5.0, 310.0, None));
        found.appends.push((BARE_APPENDS[1].2, vec![0.12]));
        found.ours.note(&crate::long::restarted(7), RESTART_TERM, 2.5);
        let text = targets(&found, 7);
        for row in [
            "| writes/s, 256 clients | ≥ 5× etcd | 5000 / 1000 = 5.00× | yes |",
            "| write latency (p50), 1 client | ≤ 0.6× etcd | – | not measured |",
            "| the same | ≤ 2.5× a bare append of 4 KiB + fdatasync | 0.31 ms / 0.12 ms = 2.6× | **no** |",
            "| restart with 1 M events and a current checkpoint | ≤ 2 s to serving | 2.50 s | **no** |",
            "| fsyncs of a member per 100 commands, 256 clients | ≤ 1 | 2.00 | **no** |",
        ] {
            assert!(text.contains(row), "{row} is not in {text}");
        }
    }
}
