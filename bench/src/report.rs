//! Medians, spread and ratios, as a table for people and for `docs/benchmarks.md`.

use crate::failover::Failover;
use crate::load::{Measured, Scenario};
use crate::system::MEMBERS;
use std::fmt::Write;
use std::time::Duration;

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
const FIGURES: [Figure; 9] = [
    ("ops/s", 1.0, |m| Some(m.rate)),
    ("p50 ms", 1e-3, |m| Some(m.p50_us)),
    ("p99 ms", 1e-3, |m| Some(m.p99_us)),
    ("members' CPU µs/op", 1.0, |m| Some(m.cpu_us)),
    ("of it the leader's", 1.0, |m| Some(m.leader_cpu_us)),
    ("of it each follower's", 1.0, |m| Some(m.follower_cpu_us)),
    ("generator's CPU µs/op", 1.0, |m| Some(m.own_cpu_us)),
    ("fsyncs/op, whole cluster", 1.0, |m| m.syncs),
    ("fsyncs/op, one member", 1.0 / MEMBERS as f64, |m| m.syncs),
];

/// The table, in Markdown: medians with least and greatest in brackets, and ours divided by theirs.
pub fn table(ours: &Results, theirs: &Results) -> String {
    let mut text = String::from("| | figure | holdfast | etcd | ratio |\n|---|---|---|---|---|\n");
    let mut row = |what: &str, figure: &str, ours: String, theirs: String, ratio: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {what} | {figure} | {ours} | {theirs} | {ratio} |");
    };
    let only_theirs = theirs.loads.iter().map(|(s, _)| s).filter(|s| ours.of(**s).is_empty());
    for scenario in ours.loads.iter().map(|(s, _)| s).chain(only_theirs) {
        let (measured, others) = (ours.of(*scenario), theirs.of(*scenario));
        for (place, (name, scale, figure)) in FIGURES.iter().enumerate() {
            let what = if place == 0 { scenario.name() } else { String::new() };
            let (a, b) = (measured.iter().filter_map(figure), others.iter().filter_map(figure));
            row(&what, name, cell(a.clone(), *scale), cell(b.clone(), *scale), ratio(a, b));
        }
        let errors = |all: &[Measured]| all.iter().map(|m| m.errors).sum::<u64>();
        if errors(measured) + errors(others) > 0 {
            row("", "errors", errors(measured).to_string(), errors(others).to_string(), "–".into());
        }
    }
    let times = |results: &Results, pick: fn(&Failover) -> Duration| -> Vec<f64> {
        results.failovers.iter().map(|f| pick(f).as_secs_f64() * 1e3).collect()
    };
    if !ours.failovers.is_empty() || !theirs.failovers.is_empty() {
        let names = ["leader killed → first accepted write", "killed member started → serves"];
        let picks: [fn(&Failover) -> Duration; 2] = [|f| f.outage, |f| f.restart];
        for (name, pick) in names.into_iter().zip(picks) {
            let (a, b) = (times(ours, pick), times(theirs, pick));
            let what = format!("{name}, {} and {} times", a.len(), b.len());
            let (a, b) = (a.into_iter(), b.into_iter());
            row(&what, "ms", cell(a.clone(), 1.0), cell(b.clone(), 1.0), ratio(a, b));
        }
    }
    let known = |(what, figure, _): &&(String, &'static str, Vec<f64>)| ours.noted(what, figure).is_empty();
    let mut before = "";
    for (what, figure, _) in ours.others.iter().chain(theirs.others.iter().filter(known)) {
        let values = |results: &Results| results.noted(what, figure).to_vec().into_iter();
        let (a, b) = (values(ours), values(theirs));
        let shown = if before == what { "" } else { what };
        row(shown, figure, cell(a.clone(), 1.0), cell(b.clone(), 1.0), ratio(a, b));
        before = what;
    }
    let ends = |results: &Results, pick: fn(&(u64, u64)) -> u64| -> Vec<f64> {
        results.ends.iter().map(|end| pick(end) as f64 / f64::from(1 << 20)).collect()
    };
    let picks: [End; 2] =
        [("memory at the end, three members", |e| e.0), ("disk at the end, three members", |e| e.1)];
    for (name, pick) in picks.into_iter().filter(|_| !ours.ends.is_empty() || !theirs.ends.is_empty()) {
        let (a, b) = (ends(ours, pick).into_iter(), ends(theirs, pick).into_iter());
        row(name, "MiB", cell(a.clone(), 1.0), cell(b.clone(), 1.0), ratio(a, b));
    }
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
    use crate::load::{Mix, Pace};

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
        let text = table(&ours, &theirs);
        assert!(
            text.contains("| write, 64 clients | ops/s | 1000 (900–3000) | 500 (400–600) | 2.00× |"),
            "{text}"
        );
        assert!(
            text.contains("| fsyncs/op, one member | – | – | – |"),
            "what was not counted is not shown as 0: {text}"
        );
    }
}
