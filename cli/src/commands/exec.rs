//! `holdfast exec`: a program or a shell in an instance, as over ssh: the same keys, pipes, window and exit code.

mod escape;
mod keyboard;
mod screen;

use crate::args::tenant::Exec;
use crate::failure::Failure;
use crate::output::{age, or_dash, table, word};
use crate::session::Session;
use escape::{Escapes, Typed};
use holdfast_client::{ExecReceiver, ExecSender, ExecStream};
use holdfast_model::api::CreateExecGrant;
use holdfast_model::exec::{
    ExecEnd, ExecGrant, ExecInput, ExecOutput, ExecProgram, ExecStatus, ExecTerminal,
};
use holdfast_model::resource::{Instance, InstanceState};
use holdfast_model::{ExecGrantId, InstanceId};
use keyboard::{Keyboard, RawTerminal};
use screen::Screen;
use serde::Serialize;
use std::io::IsTerminal;
use std::time::Instant;
use tokio::signal::unix::{SignalKind, signal};

/// What a script is told at the end of a session, beside the exit code.
#[derive(Serialize)]
struct Summary {
    grant: ExecGrantId,
    instance: InstanceId,
    end: ExecEnd,
    code: Option<u8>,
    lasted_ms: u128,
}

pub(crate) async fn run(session: &Session, arguments: Exec) -> Result<(), Failure> {
    if arguments.list {
        return list(session).await;
    }
    if let Some(grant) = arguments.end {
        session.client.revoke_exec_grant(grant).await?;
        session.output.remark(format!("{grant} is over."));
        return Ok(());
    }
    let instance = target(session, arguments.target.as_deref()).await?;
    let here = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let wants_terminal = arguments.terminal || (!arguments.no_terminal && here);
    let program = ExecProgram {
        argv: arguments.command,
        terminal: wants_terminal.then(|| ExecTerminal { kind: screen::kind(), size: screen::size() }),
    };
    if !program.is_within_bounds() {
        return Err(Failure::Usage(
            "The command is longer than 256 arguments or 32 KiB, or holds a NUL.".into(),
        ));
    }
    let body = CreateExecGrant {
        class: program.class(),
        terminal: wants_terminal,
        session_s: arguments.time.map(|time| time.as_secs()),
    };
    let made = session.client.create_exec_grant(instance, &body).await?.item;
    let grant = made.grant.id;
    let open = ExecInput::Open { secret: made.secret, program };
    let stream = session.client.exec(grant, &open).await?;
    let began = Instant::now();
    let keys = (wants_terminal && std::io::stdin().is_terminal()).then(RawTerminal::enter).transpose()?;
    let outcome = converse(stream, keys.is_some()).await;
    // Before anything is printed.
    drop(keys);
    let (end, status, reason) = outcome?;
    let code = status.map(exit_code);
    if session.output.json {
        let summary = Summary { grant, instance, end, code, lasted_ms: began.elapsed().as_millis() };
        eprintln!("{}", serde_json::to_string(&summary).map_err(|e| Failure::Host(e.to_string()))?);
    }
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(Failure::Program { code }),
        None => Err(Failure::Exec { end, reason }),
    }
}

/// As a shell has it.
fn exit_code(status: ExecStatus) -> u8 {
    match status {
        ExecStatus::Code(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        ExecStatus::Signal(signal) => u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX),
    }
}

/// The instance that is named, or the oldest that is ready of the process that is named, or of the only process.
async fn target(session: &Session, named: Option<&str>) -> Result<InstanceId, Failure> {
    if let Some(id) = named.and_then(|named| named.parse().ok()) {
        return Ok(id);
    }
    let env = session.env().await?;
    let shown = session.client.instances(env.id, false).await?.items;
    let instances: Vec<Instance> = shown.into_iter().map(|shown| shown.instance).collect();
    pick(&instances, named)
}

fn pick(instances: &[Instance], named: Option<&str>) -> Result<InstanceId, Failure> {
    let mut processes: Vec<&str> = instances.iter().map(|i| i.process.as_str()).collect();
    processes.sort_unstable();
    processes.dedup();
    let process = match (named, processes.as_slice()) {
        (Some(named), _) => named,
        (None, [only]) => only,
        (None, []) => return Err(Failure::NotFound { what: "instance", name: "of this env".into() }),
        (None, several) => {
            let several = several.join(", ");
            return Err(Failure::Usage(format!(
                "Which process? The env has {several}: name one, or an instance."
            )));
        }
    };
    let mut of_it: Vec<&Instance> = instances.iter().filter(|i| i.process.as_str() == process).collect();
    // Ready ones first; then ids rise with age.
    of_it.sort_by_key(|i| (i.state != InstanceState::Ready, i.id));
    let found = of_it.first().map(|i| i.id);
    found.ok_or_else(|| Failure::NotFound { what: "instance", name: process.to_owned() })
}

type Outcome = (ExecEnd, Option<ExecStatus>, String);

/// Passes on what is typed and what is said, to the end of the session.
async fn converse(stream: ExecStream<ExecInput, ExecOutput>, raw: bool) -> Result<Outcome, Failure> {
    let ExecStream { sender, receiver } = stream;
    let (screen, written) = Screen::start()?;
    let listening =
        |kind| signal(kind).map_err(|e| Failure::Host(format!("Cannot listen for signals: {e}.")));
    let (mut hung_up, mut told_to_end) =
        (listening(SignalKind::hangup())?, listening(SignalKind::terminate())?);
    let outcome = tokio::select! {
        biased;
        outcome = hear(receiver, screen) => outcome,
        left = speak(&sender, raw) => left,
        _ = hung_up.recv() => Ok(left_by("The terminal is gone.")),
        _ = told_to_end.recv() => Ok(left_by("This command was told to end.")),
    };
    // What was heard is written to its end.
    written
        .await
        .map_err(|_| Failure::Host("Output could not be written.".into()))?
        .map_err(Failure::Output)?;
    outcome
}

fn left_by(reason: &str) -> Outcome {
    (ExecEnd::ClientDisconnect, None, reason.to_owned())
}

async fn hear(mut receiver: ExecReceiver<ExecOutput>, screen: Screen) -> Result<Outcome, Failure> {
    let mut status = None;
    loop {
        let reached = match receiver.next().await? {
            Some(ExecOutput::Started) => true,
            Some(ExecOutput::Stdout(bytes)) => screen.out(bytes).await,
            Some(ExecOutput::Stderr(bytes)) => screen.err(bytes).await,
            Some(ExecOutput::Exit(exit)) => {
                status = Some(exit);
                true
            }
            Some(ExecOutput::Ended { end, reason }) => return Ok((end, status, reason)),
            None if status.is_some() => return Ok((ExecEnd::Exited, status, String::new())),
            None => return Ok((ExecEnd::Lost, None, "The connection to the cluster broke off.".into())),
        };
        if !reached {
            return Ok(left_by("Standard output is closed."));
        }
    }
}

/// Ends only when the person leaves; a session whose input ended goes on.
async fn speak(sender: &ExecSender<ExecInput>, raw: bool) -> Result<Outcome, Failure> {
    let mut keyboard = Some(Keyboard::start()?);
    let mut escapes = Escapes::default();
    let mut resized = signal(SignalKind::window_change())
        .map_err(|e| Failure::Host(format!("Cannot listen for signals: {e}.")))?;
    loop {
        let frame = tokio::select! {
            typed = typed(&mut keyboard) => match typed {
                Some(bytes) if raw => match escapes.pass(bytes) {
                    Typed::Text(bytes) if bytes.is_empty() => continue,
                    Typed::Text(bytes) => ExecInput::Stdin(bytes),
                    Typed::Leave => {
                        // The member finds the stream ended otherwise.
                        sender.send(&ExecInput::Close { kill: false }).await.ok();
                        return Ok(left_by("You left the session; what ran in it was hung up."));
                    }
                },
                Some(bytes) => ExecInput::Stdin(bytes),
                None => {
                    keyboard = None;
                    ExecInput::StdinEnds
                }
            },
            _ = resized.recv() => ExecInput::Resize(screen::size()),
        };
        // Whoever hears the program learns why nobody takes what is typed.
        if sender.send(&frame).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn typed(keyboard: &mut Option<Keyboard>) -> Option<Vec<u8>> {
    match keyboard {
        Some(keyboard) => keyboard.next().await,
        None => std::future::pending().await,
    }
}

async fn list(session: &Session) -> Result<(), Failure> {
    let env = session.env().await?;
    let grants = session.client.exec_grants(env.id).await?.items;
    session
        .output
        .show(&grants, || table(["ID", "INSTANCE", "FOR", "BY", "SINCE", "ENDS"], grants.iter().map(row)))
}

fn row(grant: &ExecGrant) -> [String; 6] {
    [
        grant.id.to_string(),
        grant.instance.to_string(),
        word(&grant.class),
        grant.principal.to_string(),
        or_dash(grant.used.map(|used| age(used.at))),
        crate::output::time(grant.used.map_or(grant.use_before, |used| used.ends_at)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_a_shells() {
        assert_eq!(exit_code(ExecStatus::Code(0)), 0);
        assert_eq!(exit_code(ExecStatus::Code(7)), 7);
        assert_eq!(exit_code(ExecStatus::Code(256 + 3)), 3);
        assert_eq!(exit_code(ExecStatus::Signal(9)), 137);
    }
}
