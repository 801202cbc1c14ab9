//! `holdfast logs`: what instances wrote, as their nodes keep it, and what they write.
//!
//! Each instance is read through a stream of its own. A stream that breaks is opened again, at any member, behind the last
//! line that was printed: nothing is printed twice, and what was lost meanwhile is counted by who lost it.

use crate::args::tenant::Logs;
use crate::failure::Failure;
use crate::output::time;
use crate::session::Session;
use crate::terminal::harmless;
use holdfast_client::{Client, Lines};
use holdfast_model::agent::LogStream;
use holdfast_model::logs::{LogRecord, LogStart, LogText};
use holdfast_model::resource::Instance;
use holdfast_model::{Code, EnvId, InstanceId, Timestamp};
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Between two looks for new instances.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Before a stream that broke is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// Instances that are read at a time: members bound the streams of an org.
const INSTANCES_MAX: usize = 48;
/// Records that wait to be printed.
const QUEUED_MAX: usize = 64;

/// One instance to be read.
#[derive(Clone, Debug)]
struct Source {
    id: InstanceId,
    process: String,
    ended: bool,
}

impl From<Instance> for Source {
    fn from(instance: Instance) -> Self {
        let ended = instance.state.is_final();
        Self { id: instance.id, process: instance.process.to_string(), ended }
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    instance: InstanceId,
    process: &'a str,
    #[serde(flatten)]
    record: &'a LogRecord,
}

/// Which instances are meant.
enum Choice {
    One(Source),
    Of { env: EnvId, process: Option<String> },
}

impl Choice {
    async fn new(session: &Session, arguments: &Logs) -> Result<Self, Failure> {
        if let Some(named) = &arguments.instance {
            let id =
                named.parse().map_err(|e: holdfast_model::id::IdError| Failure::Usage(format!("{e}.")))?;
            return match session.client.instance(id).await {
                Ok(answer) => Ok(Self::One(answer.item.instance.into())),
                // To read lines one need not be allowed to read the env.
                Err(error) if error.code() == Code::Forbidden.as_str() => {
                    Ok(Self::One(Source { id, process: String::new(), ended: false }))
                }
                Err(error) => Err(error.into()),
            };
        }
        let process = arguments.process.as_ref().map(ToString::to_string);
        Ok(Self::Of { env: session.env().await?.id, process })
    }

    /// The instances now, those that have ended included.
    async fn sources(&self, client: &Client) -> Result<Vec<Source>, Failure> {
        let (env, process) = match self {
            Self::One(source) => return Ok(vec![source.clone()]),
            Self::Of { env, process } => (*env, process),
        };
        let instances = client.instances(env, true).await?.items.into_iter().map(|shown| shown.instance);
        let meant = |i: &Instance| process.as_ref().is_none_or(|process| i.process.as_str() == process);
        Ok(instances.filter(meant).map(Source::from).collect())
    }
}

pub(crate) async fn run(session: &Session, arguments: Logs) -> Result<(), Failure> {
    let since_ms = arguments.since.map_or(0, |since| {
        let from = SystemTime::now().checked_sub(since).unwrap_or(UNIX_EPOCH);
        u64::try_from(from.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
    });
    // Who names a time wants all from then on.
    let tail = arguments.tail.or((arguments.since.is_none()).then_some(TAIL_DEFAULT));
    let start = LogStart { after: None, since_ms, tail };
    let choice = Choice::new(session, &arguments).await?;
    let printer =
        Printer { session, prefix: matches!(choice, Choice::Of { .. }), timestamps: arguments.timestamps };
    if arguments.follow {
        follow(&printer, &choice, start, arguments.all).await
    } else {
        read(&printer, &choice, start, arguments.all).await
    }
}

/// Lines of each instance that are shown when nothing is said.
const TAIL_DEFAULT: u64 = 200;

/// Those that are to be read from the start on: one that is named, else those that have not ended, or `all`.
fn wanted(choice: &Choice, found: Vec<Source>, all: bool) -> Result<Vec<Source>, Failure> {
    let named = matches!(choice, Choice::One(_));
    let sources: Vec<Source> = found.into_iter().filter(|source| all || named || !source.ended).collect();
    if sources.len() <= INSTANCES_MAX {
        return Ok(sources);
    }
    let number = sources.len();
    Err(Failure::Usage(format!(
        "There are {number} instances, and {INSTANCES_MAX} are read at a time; name a --process or an --instance."
    )))
}

/// Prints what there is, merged by time.
async fn read(printer: &Printer<'_>, choice: &Choice, start: LogStart, all: bool) -> Result<(), Failure> {
    let client = &printer.session.client;
    let sources = wanted(choice, choice.sources(client).await?, all)?;
    let mut streams = Vec::new();
    for source in sources {
        let mut stream = Reading::new(client.clone(), source, start, false);
        let head = stream.next().await?;
        streams.push((stream, head));
    }
    let mut away = None;
    loop {
        // A remark counts as old as can be: it belongs in front of what follows it.
        let time_ms = |head: &Option<LogRecord>| match head {
            Some(LogRecord::Line(line)) => Some(line.time_ms),
            Some(_) => Some(0),
            None => None,
        };
        let first =
            streams.iter_mut().filter(|(_, head)| head.is_some()).min_by_key(|(_, head)| time_ms(head));
        let Some((stream, head)) = first else { break };
        if let Some(record) = head.take() {
            printer.print(&stream.source, &record)?;
            if let LogRecord::Away { detail, .. } = record {
                // There is no more of it now.
                away = Some(detail);
                continue;
            }
        }
        *head = stream.next().await?;
    }
    away.map_or(Ok(()), |detail| Err(Failure::Incomplete(detail)))
}

/// Prints what there is and what comes, until everything that was named has ended.
async fn follow(printer: &Printer<'_>, choice: &Choice, start: LogStart, all: bool) -> Result<(), Failure> {
    let client = &printer.session.client;
    let found = choice.sources(client).await?;
    // What is there now is read from where it was asked for; what comes later, from its first line. An instance may begin
    // and end between two looks, so that those that have ended are looked at too.
    let mut known: BTreeSet<InstanceId> = found.iter().map(|source| source.id).collect();
    let (records, mut queue) = mpsc::channel(QUEUED_MAX);
    let mut readers = JoinSet::new();
    for source in wanted(choice, found, all)? {
        readers.spawn(pump(Reading::new(client.clone(), source, start, true), records.clone()));
    }
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some((source, record)) = queue.recv() => printer.print(&source, &record)?,
            Some(ended) = readers.join_next() => {
                let lost = ended.map_err(|e| Failure::Host(e.to_string()))??;
                if readers.is_empty() && matches!(choice, Choice::One(_)) {
                    while let Ok((source, record)) = queue.try_recv() {
                        printer.print(&source, &record)?;
                    }
                    return lost.map_or(Ok(()), |detail| Err(Failure::Incomplete(detail)));
                }
            }
            _ = look.tick(), if matches!(choice, Choice::Of { .. }) => {
                let found = match choice.sources(client).await {
                    Ok(found) => found,
                    Err(failure) if failure.is_transient() => continue,
                    Err(failure) => return Err(failure),
                };
                for source in found {
                    // One more waits until another has ended.
                    if readers.len() < INSTANCES_MAX && known.insert(source.id) {
                        let stream = Reading::new(client.clone(), source, LogStart::default(), true);
                        readers.spawn(pump(stream, records.clone()));
                    }
                }
            }
        }
    }
}

/// Passes records on to the end; answers with why some of them cannot be had, if so.
async fn pump(
    mut stream: Reading,
    records: mpsc::Sender<(Source, LogRecord)>,
) -> Result<Option<String>, Failure> {
    let mut lost = None;
    while let Some(record) = stream.next().await? {
        if let LogRecord::Away { detail, ended: true } = &record {
            lost = Some(detail.clone());
        }
        if records.send((stream.source.clone(), record)).await.is_err() {
            break;
        }
    }
    Ok(lost)
}

/// One instance's records, over as many streams as it takes.
struct Reading {
    client: Client,
    source: Source,
    /// Behind the last line that was handed out.
    start: LogStart,
    follow: bool,
    stream: Option<Lines<LogRecord>>,
    ended: bool,
    /// Whether it was said that lines cannot be had now.
    away: bool,
}

impl Reading {
    const fn new(client: Client, source: Source, start: LogStart, follow: bool) -> Self {
        Self { client, source, start, follow, stream: None, ended: false, away: false }
    }

    /// The next record but the end; `None` when all is read.
    async fn next(&mut self) -> Result<Option<LogRecord>, Failure> {
        while !self.ended {
            let stream = match &mut self.stream {
                Some(stream) => stream,
                none => match self.client.read_logs(self.source.id, &self.start, self.follow).await {
                    Ok(stream) => none.insert(stream),
                    Err(error) => {
                        self.broke(error.into()).await?;
                        continue;
                    }
                },
            };
            match stream.next().await {
                Ok(Some(LogRecord::End { .. })) => self.ended = true,
                Ok(Some(LogRecord::Away { ended: false, .. })) if self.away => {}
                Ok(Some(record)) => {
                    self.away = matches!(record, LogRecord::Away { .. });
                    self.ended = matches!(record, LogRecord::Away { ended: true, .. });
                    if let LogRecord::Line(line) = &record {
                        self.start = LogStart { after: Some(line.cursor), ..LogStart::default() };
                    }
                    return Ok(Some(record));
                }
                // Cut: the member stops, or the token ended, which the next one says.
                Ok(None) => {
                    self.stream = None;
                    tokio::time::sleep(REOPEN_PAUSE).await;
                }
                Err(error) => {
                    self.stream = None;
                    self.broke(error.into()).await?;
                }
            }
        }
        Ok(None)
    }

    /// Pauses when it can be tried again.
    async fn broke(&self, failure: Failure) -> Result<(), Failure> {
        let again = self.follow || self.start.after.is_some();
        if !again || !failure.is_transient() {
            return Err(failure);
        }
        tokio::time::sleep(REOPEN_PAUSE).await;
        Ok(())
    }
}

struct Printer<'s> {
    session: &'s Session,
    prefix: bool,
    timestamps: bool,
}

impl Printer<'_> {
    fn print(&self, source: &Source, record: &LogRecord) -> Result<(), Failure> {
        let output = &self.session.output;
        let from =
            if self.prefix { format!("{} {} | ", source.process, short(source.id)) } else { String::new() };
        if !output.json {
            match record {
                LogRecord::Away { detail, .. } => {
                    output.remark(format!("{from}{}", harmless(detail)));
                    return Ok(());
                }
                LogRecord::Dropped { lines } => {
                    output.remark(format!("{from}{lines} lines dropped: they are no longer kept"));
                    return Ok(());
                }
                LogRecord::Line(_) | LogRecord::End { .. } => {}
            }
        }
        let shown = Shown { instance: source.id, process: &source.process, record };
        output.line(&shown, || match record {
            LogRecord::Line(line) => format!("{from}{}", text(line, self.timestamps)),
            _ => String::new(),
        })
    }
}

/// Enough of an id to tell instances of an env apart.
fn short(id: InstanceId) -> String {
    let text = id.to_string();
    text.get(text.len().saturating_sub(6)..).unwrap_or(&text).to_owned()
}

fn text(line: &LogText, timestamps: bool) -> String {
    let at = if timestamps { format!("{} ", time(Timestamp(line.time_ms))) } else { String::new() };
    let mark = match line.stream {
        LogStream::Stdout | LogStream::Stderr => "",
        LogStream::System => "* ",
    };
    format!("{at}{mark}{}{}", harmless(&line.text), if line.continues { "…" } else { "" })
}
