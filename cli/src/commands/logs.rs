//! `holdfast logs`: what instances wrote, as their nodes keep it.

use crate::args::tenant::Logs;
use crate::failure::Failure;
use crate::output::time;
use crate::session::Session;
use holdfast_model::agent::{LogLine, LogStream};
use holdfast_model::{InstanceId, Timestamp};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a node waits for a line before it answers that there is none, in milliseconds.
const WAIT_MS: u64 = 1_000;
/// Between two looks while nothing is written.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Lines that are fetched at a time.
const LINES_MAX: u32 = 1_000;

#[derive(Serialize)]
struct Shown<'a> {
    instance: InstanceId,
    #[serde(flatten)]
    line: &'a LogLine,
}

pub(crate) async fn run(session: &Session, arguments: Logs) -> Result<(), Failure> {
    let since = arguments.since.map_or(0, |since| {
        let from = SystemTime::now().checked_sub(since).unwrap_or(UNIX_EPOCH);
        u64::try_from(from.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
    });
    let mut seen: BTreeMap<InstanceId, Option<u64>> = BTreeMap::new();
    loop {
        let instances = match instances(session, &arguments).await {
            Ok(instances) => instances,
            Err(failure) if arguments.follow && failure.is_transient() => {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let several = instances.len() > 1;
        let mut lines = Vec::new();
        for instance in instances {
            let after = seen.get(&instance).copied().flatten();
            let wait_ms = if arguments.follow && !several && after.is_some() { WAIT_MS } else { 0 };
            let limit = if after.is_some() { LINES_MAX } else { arguments.lines.clamp(1, LINES_MAX) };
            match session.client.logs(instance, after, limit, wait_ms).await.map_err(Failure::from) {
                Ok(page) => {
                    let last = page.lines.last().map(|l| l.seq).or(after);
                    seen.insert(instance, last);
                    lines
                        .extend(page.lines.into_iter().filter(|l| l.time_ms >= since).map(|l| (instance, l)));
                }
                Err(failure) if arguments.follow && failure.is_transient() => {}
                Err(failure) => return Err(failure),
            }
        }
        lines.sort_by_key(|(_, line)| line.time_ms);
        let idle = lines.is_empty();
        for (instance, line) in &lines {
            session.output.line(&Shown { instance: *instance, line }, || shown(*instance, line, several))?;
        }
        if !arguments.follow {
            return Ok(());
        }
        if idle {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn instances(session: &Session, arguments: &Logs) -> Result<Vec<InstanceId>, Failure> {
    if let Some(named) = &arguments.instance {
        let id = named.parse().map_err(|e: holdfast_model::id::IdError| Failure::Usage(format!("{e}.")))?;
        return Ok(vec![id]);
    }
    let env = session.env().await?;
    Ok(session.client.instances(env.id, false).await?.items.iter().map(|i| i.id).collect())
}

fn shown(instance: InstanceId, line: &LogLine, several: bool) -> String {
    let stream = match line.stream {
        LogStream::Stdout => ' ',
        LogStream::Stderr => '!',
        LogStream::System => '*',
    };
    let instance = if several { format!("{instance} ") } else { String::new() };
    format!("{} {instance}{stream} {}", time(Timestamp(line.time_ms)), line.text)
}
