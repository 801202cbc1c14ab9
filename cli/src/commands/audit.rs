//! `holdfast audit search|export`: the history as evidence.

use crate::args::audit::{Export, Search};
use crate::commands::events;
use crate::commands::watch::Progress;
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::audit::{AUDIT_FORM, AuditEnd, AuditHeader};
use holdfast_model::limits::PAGE_MAX;
use holdfast_model::{Digest, Event, Revision, Timestamp};
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Prints what fits, over the whole history that the login may see.
pub(crate) async fn search(session: &Session, arguments: Search) -> Result<(), Failure> {
    let wanted = Wanted::of(&arguments);
    let mut left = arguments.limit;
    let mut after = Revision(arguments.after);
    let mut progress = Progress::new(session.output);
    loop {
        let page = session.client.events(after, PAGE_MAX).await?;
        for event in page.items.iter().filter(|event| wanted.takes(event)) {
            if left == 0 {
                progress.clear();
                session.output.remark("There is more: ask with a higher --limit, or with --after.");
                return Ok(());
            }
            left -= 1;
            progress.clear();
            session.output.line(event, || events::line(event))?;
        }
        let Some(next) = page.next.and_then(|next| next.parse().ok()) else { break };
        after = next;
        progress.say("Reading the history", &format!(": revision {after} of {}", page.revision));
    }
    progress.clear();
    Ok(())
}

/// What is searched for.
struct Wanted<'a> {
    arguments: &'a Search,
    from: Option<Timestamp>,
    to: Option<Timestamp>,
}

impl<'a> Wanted<'a> {
    fn of(arguments: &'a Search) -> Self {
        let ago = |age: Duration| {
            let at = SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH);
            let ms = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            Timestamp(u64::try_from(ms).unwrap_or(u64::MAX))
        };
        Self { arguments, from: arguments.since.map(ago), to: arguments.until.map(ago) }
    }

    fn takes(&self, event: &Event) -> bool {
        let Search { actor, kind, about, source, request, .. } = self.arguments;
        let is_about = |what: &String| {
            let named = events::about(&event.aggregate);
            let kind = serde_json::to_value(event.aggregate).ok();
            let kind =
                kind.as_ref().and_then(|value| value.as_object()).and_then(|map| map.keys().next().cloned());
            named == *what || kind.is_some_and(|kind| kind == *what)
        };
        actor.as_ref().is_none_or(|text| event.actor.to_string().contains(text.as_str()))
            && (kind.is_empty() || kind.iter().any(|kind| kind == event.payload.kind()))
            && about.as_ref().is_none_or(is_about)
            && source.is_none_or(|address| event.source == Some(address))
            && request.is_none_or(|id| event.request_id == id)
            && self.from.is_none_or(|from| event.time >= from)
            && self.to.is_none_or(|to| event.time <= to)
    }
}

/// Writes every event up to now and the checkpoint that covers them. The file is there under its name only when it is
/// whole.
pub(crate) async fn export(session: &Session, arguments: Export) -> Result<(), Failure> {
    let path = arguments.file.as_path();
    if path.exists() {
        return Err(Failure::Usage(format!("{} is there already; name another file.", path.display())));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let staged =
        tempfile::NamedTempFile::new_in(folder).map_err(Failure::file("create a file in", folder))?;
    let checkpoint = session.client.audit_checkpoint().await?.item;
    let after = Revision(arguments.after);
    if after >= checkpoint.revision {
        let last = checkpoint.revision;
        return Err(Failure::Usage(format!(
            "The history ends with revision {last}: nothing came after {after}."
        )));
    }
    let chain = match after.0.checked_sub(1) {
        None => Digest::default(),
        Some(before) => {
            let page = session.client.events(Revision(before), 1).await?;
            let last = page.items.first().filter(|event| event.revision == after).map(|event| event.chain);
            last.ok_or_else(|| {
                Failure::Incomplete(format!("revision {after} may not be seen with this login"))
            })?
        }
    };
    let mut out = Lines { path, file: BufWriter::new(staged.as_file()) };
    out.write(&AuditHeader { holdfast_audit: AUDIT_FORM, cluster: checkpoint.cluster, after, chain })?;
    let mut progress = Progress::new(session.output);
    let (mut at, mut events) = (after, 0_u64);
    while at < checkpoint.revision {
        let page = session.client.events(at, PAGE_MAX).await?;
        for event in page.items.iter().take_while(|event| event.revision <= checkpoint.revision) {
            out.write(event)?;
            events += 1;
        }
        let next = page.next.and_then(|next| next.parse().ok());
        at = next.unwrap_or(checkpoint.revision);
        progress.say(
            "Reading the history",
            &format!(": revision {} of {}", at.min(checkpoint.revision), checkpoint.revision),
        );
    }
    progress.clear();
    let revision = checkpoint.revision;
    out.write(&AuditEnd { checkpoint })?;
    out.file.flush().map_err(Failure::file("write", path))?;
    drop(out);
    staged.as_file().sync_all().map_err(Failure::file("write", path))?;
    staged.persist_noclobber(path).map_err(|error| Failure::file("write", path)(error.error))?;
    let done = Exported { file: path.display().to_string(), after, revision, events };
    session.output.show(&done, || {
        format!(
            "{}: {events} events, revisions {}–{revision}, with a signed checkpoint.",
            done.file,
            after.next()
        )
    })
}

/// What was exported.
#[derive(Serialize)]
struct Exported {
    file: String,
    after: Revision,
    revision: Revision,
    events: u64,
}

struct Lines<'a> {
    path: &'a Path,
    file: BufWriter<&'a File>,
}

impl Lines<'_> {
    fn write(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line =
            serde_json::to_string(value).map_err(|error| Failure::Output(std::io::Error::other(error)))?;
        writeln!(self.file, "{line}").map_err(Failure::file("write", self.path))
    }
}
