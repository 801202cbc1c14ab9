//! Watching what the control plane goes on with by itself, and saying how far it is.

use crate::failure::Failure;
use crate::output::Output;
use crate::session::Session;
use holdfast_client::ClientError;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// Between two frames of the spinner.
const SPIN_EVERY: Duration = Duration::from_millis(120);

/// Looks until it is done, or for as long as was asked. A look says how far it is, and gives what came of it in the end.
pub(crate) async fn watch<T>(
    session: &Session,
    what: &str,
    patience: Duration,
    look: impl AsyncFn(&mut Progress) -> Result<Option<T>, ClientError>,
) -> Result<T, Failure> {
    let deadline = Instant::now() + patience;
    let mut progress = Progress::new(session.output);
    loop {
        match look(&mut progress).await {
            Ok(Some(end)) => {
                progress.clear();
                return Ok(end);
            }
            Ok(None) => {}
            // The control plane may be away for a while; what it started goes on.
            Err(error) if error.is_retryable() => progress.say("no member answers; still trying", ""),
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            progress.clear();
            return Err(Failure::WaitTimedOut { what: what.to_owned(), after: patience });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A spinner where somebody watches; elsewhere a line for each change.
pub(crate) struct Progress {
    output: Output,
    bar: Option<ProgressBar>,
    last: String,
}

impl Progress {
    pub(crate) fn new(output: Output) -> Self {
        let bar = output.watched.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(SPIN_EVERY);
            bar
        });
        Self { output, bar, last: String::new() }
    }

    /// `more` changes often: who does not watch is not told.
    pub(crate) fn say(&mut self, line: &str, more: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{line}{more}")),
            None if line != self.last => self.output.remark(line),
            None => {}
        }
        line.clone_into(&mut self.last);
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            self.output.remark(&self.last);
        }
    }
}
