//! `holdfast audit verify`: whether an exported history is what the cluster wrote. Asks nobody but the file and the
//! certificate.

use crate::args::audit::Verify;
use crate::failure::Failure;
use crate::output::{Output, time};
use data_encoding::BASE64;
use holdfast_identity::CaCertificate;
use holdfast_model::audit::{AUDIT_FORM, AuditCheckpoint, AuditEnd, AuditHeader, CHECKPOINT_PURPOSE};
use holdfast_model::limits::BODY_BYTES_MAX;
use holdfast_model::{Event, Revision};
use holdfast_store::Chain;
use serde::Serialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// A line that is longer is not an event: none is larger than the command that made it, eight times over as JSON.
const LINE_BYTES_MAX: u64 = 8 * BODY_BYTES_MAX as u64;

pub(crate) fn run(output: Output, arguments: &Verify) -> Result<(), Failure> {
    let ca =
        std::fs::read_to_string(&arguments.ca_file).map_err(Failure::file("read", &arguments.ca_file))?;
    let ca = CaCertificate::from_pem(&ca).map_err(|_| {
        Failure::Usage(format!("{} holds no CA certificate in PEM.", arguments.ca_file.display()))
    })?;
    let earlier = match &arguments.continues {
        Some(path) => Some(read(path, &ca, None)?),
        None => None,
    };
    let verified = read(&arguments.file, &ca, earlier.as_ref())?;
    output.show(&verified, || {
        let Verified { events, after, checkpoint, .. } = &verified;
        let (revision, signed) = (checkpoint.revision, time(checkpoint.signed_at));
        let begin = match after.0 {
            0 => "from the beginning".to_owned(),
            after => format!("after revision {after}, whose chain it begins with"),
        };
        format!(
            "{events} events {begin} to revision {revision}: unchanged, in order and without a gap, as the authority of \
             {} signed at {signed}.",
            checkpoint.cluster
        )
    })
}

/// What was found right.
#[derive(Debug, Serialize)]
struct Verified {
    file: String,
    after: Revision,
    events: u64,
    checkpoint: AuditCheckpoint,
    #[serde(skip)]
    end: Chain,
}

fn read(path: &Path, ca: &CaCertificate, earlier: Option<&Verified>) -> Result<Verified, Failure> {
    let wrong = |why: String| Failure::NotAuthentic(format!("{}: {why}.", path.display()));
    let mut lines = BufReader::new(File::open(path).map_err(Failure::file("read", path))?);
    let first = line(&mut lines, path)?.ok_or_else(|| wrong("it is empty".into()))?;
    let header: AuditHeader = serde_json::from_str(&first)
        .map_err(|error| wrong(format!("its first line is not that of an exported history: {error}")))?;
    if header.holdfast_audit != AUDIT_FORM {
        return Err(wrong(format!("its form {} is not known; use a newer release", header.holdfast_audit)));
    }
    let mut chain = Chain { revision: header.after, digest: header.chain };
    if header.after == Revision(0) && chain != Chain::default() {
        return Err(wrong("it begins with the first event and names a chain before it".into()));
    }
    if let Some(earlier) = earlier.filter(|earlier| earlier.end != chain) {
        return Err(wrong(format!(
            "it does not go on where {} ends, at revision {}",
            earlier.file, earlier.end.revision
        )));
    }
    let mut events = 0;
    let checkpoint = loop {
        let Some(line) = line(&mut lines, path)? else {
            return Err(wrong(format!(
                "it ends after revision {} without a checkpoint: it was cut",
                chain.revision
            )));
        };
        if let Ok(AuditEnd { checkpoint }) = serde_json::from_str(&line) {
            break checkpoint;
        }
        let event: Event = serde_json::from_str(&line)
            .map_err(|error| wrong(format!("after revision {} comes no event: {error}", chain.revision)))?;
        chain.follow(&event).map_err(|error| wrong(error.to_string()))?;
        events += 1;
    };
    if line(&mut lines, path)?.is_some() {
        return Err(wrong("something follows its checkpoint".into()));
    }
    let signature = BASE64.decode(checkpoint.signature.as_bytes()).unwrap_or_default();
    if !ca.has_signed(CHECKPOINT_PURPOSE, &checkpoint.statement(), &signature) {
        return Err(wrong("this authority did not sign its checkpoint".into()));
    }
    if checkpoint.cluster != header.cluster {
        return Err(wrong("its checkpoint is another cluster's".into()));
    }
    if (checkpoint.revision, checkpoint.chain) != (chain.revision, chain.digest) {
        let (signed, found) = (checkpoint.revision, chain.revision);
        return Err(wrong(format!(
            "its events, up to revision {found}, are not those that were signed, up to {signed}"
        )));
    }
    Ok(Verified { file: path.display().to_string(), after: header.after, events, checkpoint, end: chain })
}

fn line(lines: &mut impl BufRead, path: &Path) -> Result<Option<String>, Failure> {
    let mut text = String::new();
    let read =
        lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut text).map_err(Failure::file("read", path))?;
    Ok((read > 0).then_some(text))
}
