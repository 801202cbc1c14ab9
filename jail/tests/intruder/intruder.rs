//! A stand-in for a VMM that a guest has taken over: it tries what such a process would try, and says of each attempt
//! whether it succeeded.
//!
//! Started as the launcher it puts itself into the jail first, as the `holdfast` binary does with a VMM. Arguments: the
//! attempts, separated by commas, and then what they need as `name=value`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod attempts;
mod resources;

use std::collections::BTreeMap;
use std::io::Write;

fn main() {
    holdfast_jail::launcher::enter_if_asked();
    let mut arguments = std::env::args().skip(1);
    let wanted = arguments.next().unwrap_or_default();
    let given: BTreeMap<String, String> = arguments
        .filter_map(|pair| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
        .collect();
    for name in wanted.split(',').filter(|name| !name.is_empty()) {
        // What is said before an attempt is there even if the attempt is the end.
        say(&format!("tries {name}"));
        match attempts::attempt(name, &given) {
            Ok(detail) => say(&format!("succeeded {name} {detail}")),
            Err(error) => say(&format!("failed {name} {error}")),
        }
    }
    say("end");
    if given.contains_key("stay") {
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").ok();
    out.flush().ok();
}
