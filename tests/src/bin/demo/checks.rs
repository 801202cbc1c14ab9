//! What has to hold, whether it did, and the table at the end.

use holdfast_tests::load::Tally;
use std::time::Duration;

/// Everything that was promised so far.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    held: bool,
    what: String,
    sent: Option<usize>,
    failed: Option<usize>,
    seen: String,
}

impl Checks {
    /// A promise without requests.
    pub(crate) fn check(&mut self, what: &str, held: bool, seen: impl Into<String>) {
        self.add(Row { held, what: what.to_owned(), sent: None, failed: None, seen: seen.into() });
    }

    /// A promise that no request fails, and that there were some.
    pub(crate) fn no_failure(&mut self, what: &str, tally: &Tally) {
        let reasons =
            if tally.reasons.is_empty() { String::new() } else { format!("; {}", tally.reasons.join("; ")) };
        self.add(Row {
            held: tally.failed == 0 && tally.sent > 0,
            what: what.to_owned(),
            sent: Some(tally.sent),
            failed: Some(tally.failed),
            seen: format!("slowest {} ms{reasons}", tally.slowest.as_millis()),
        });
    }

    fn add(&mut self, row: Row) {
        println!("   {} {} ({})", if row.held { "ok  " } else { "FAIL" }, row.what, row.seen);
        self.rows.push(row);
    }

    /// Prints all of it, and says whether all of it held.
    pub(crate) fn conclude(&self, took: Duration) -> bool {
        let number = |n: Option<usize>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let width = self.rows.iter().map(|r| r.what.chars().count()).max().unwrap_or_default();
        println!("\n   held  sent   failed  {:width$}  seen", "what");
        for row in &self.rows {
            println!(
                "   {:<4}  {:<5}  {:<6}  {:width$}  {}",
                if row.held { "yes" } else { "NO" },
                number(row.sent),
                number(row.failed),
                row.what,
                row.seen
            );
        }
        let held = self.rows.iter().all(|r| r.held);
        println!(
            "\n   {} in {:.1} s",
            if held { "everything held" } else { "NOT everything held" },
            took.as_secs_f32()
        );
        held
    }
}
