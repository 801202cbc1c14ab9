//! What a command prints: tables for people, JSON for scripts. Results go to standard output, remarks to standard
//! error; colour and progress only where a person looks, and never under NO_COLOR.

use crate::failure::Failure;
use comfy_table::{ContentArrangement, Table};
use holdfast_model::Timestamp;
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of tables.
    pub(crate) json: bool,
    /// Somebody watches standard error.
    pub(crate) watched: bool,
    colour: bool,
}

impl Output {
    /// As the environment and `--json` say.
    pub(crate) fn new(json: bool) -> Self {
        let watched = std::io::stderr().is_terminal();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self { json, watched: watched && !json, colour: watched && !plain }
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    pub(crate) fn show<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let mut shown = if self.json {
            serde_json::to_string_pretty(value).map_err(|e| Failure::Output(std::io::Error::other(e)))?
        } else {
            text()
        };
        if !shown.is_empty() && !shown.ends_with('\n') {
            shown.push('\n');
        }
        write_out(&shown)
    }

    /// Prints one value of a stream: a line of JSON, or a line of text.
    pub(crate) fn line<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let mut shown = if self.json {
            serde_json::to_string(value).map_err(|e| Failure::Output(std::io::Error::other(e)))?
        } else {
            text()
        };
        shown.push('\n');
        write_out(&shown)
    }

    /// Tells a person something that is not the result.
    pub(crate) fn remark(&self, text: impl AsRef<str>) {
        if !self.json {
            eprintln!("{}", text.as_ref());
        }
    }

    /// Prints why the command failed.
    pub(crate) fn failure(&self, failure: &Failure) {
        let hint = failure.hint();
        if self.json {
            let report = FailureReport {
                code: failure.code(),
                message: failure.to_string(),
                hint,
                exit: failure.exit(),
            };
            eprintln!("{}", serde_json::to_string(&report).unwrap_or_else(|_| failure.to_string()));
            return;
        }
        let label = if self.colour { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
        eprintln!("{label} {failure}");
        if let Some(hint) = hint {
            eprintln!("{} {hint}", if self.colour { "\x1b[1mhint:\x1b[0m" } else { "hint:" });
        }
    }
}

#[derive(Serialize)]
struct FailureReport {
    code: String,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    exit: u8,
}

fn write_out(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
}

/// A table without borders. No rows make a remark instead of a lonely header.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    let mut empty = true;
    for row in rows {
        table.add_row(row);
        empty = false;
    }
    if empty {
        return "Nothing here yet.".into();
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// How long ago, in its largest unit: `3m`.
pub(crate) fn age(time: Timestamp) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let now = Timestamp(u64::try_from(now).unwrap_or(u64::MAX));
    short(Duration::from_millis(now.since(time)))
}

/// A duration in its largest unit.
fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The last moment that RFC 3339 has a form for, the end of the year 9999, in milliseconds: later ones are shown as it.
const LAST_SHOWN_MS: u64 = 253_402_300_799_999;

/// A time in RFC 3339, in UTC.
pub(crate) fn time(time: Timestamp) -> String {
    let shown = Duration::from_millis(time.0.min(LAST_SHOWN_MS));
    humantime::format_rfc3339_millis(UNIX_EPOCH + shown).to_string()
}

/// The stable snake_case name of a plain enum, as the API spells it.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        Ok(other) => other.to_string(),
        Err(_) => "?".into(),
    }
}

/// A value, or a dash.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |v| v.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_end_without_spaces() {
        let rows = [["web".into(), "2".into()], ["a-long-name".into(), "10".into()]];
        assert_eq!(table(["NAME", "COUNT"], rows), "NAME         COUNT\nweb          2\na-long-name  10");
        assert_eq!(table::<1>(["NAME"], []), "Nothing here yet.");
    }

    #[test]
    fn durations_are_short() {
        let shown = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 864_000].map(|s| short(Duration::from_secs(s)));
        assert_eq!(shown, ["0s", "59s", "1m", "59m", "1h", "23h", "1d", "10d"]);
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time(Timestamp(1_700_000_000_123)), "2023-11-14T22:13:20.123Z");
    }

    #[test]
    fn words_are_the_apis() {
        assert_eq!(word(&holdfast_model::resource::InstanceState::Booting), "booting");
    }
}
