//! Where remarks of the program go: standard error, more of them with `-v`, all as `HOLDFAST_LOG` says.

use crate::args::operator::{EdgeCommand, NodeCommand, ServerCommand};
use crate::args::{Cli, Command};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Begins to write remarks.
pub(crate) fn start(cli: &Cli) {
    // A process that serves says what it does; a command stays quiet unless something is wrong.
    let level = match (cli.global.verbose, serves(&cli.command)) {
        (0, false) => "warn",
        (0, true) | (1, false) => "info,openraft=error",
        (1, true) | (2, _) => "debug,h2=info,hyper=info,rustls=info,openraft=info",
        _ => "trace",
    };
    let filter = EnvFilter::builder()
        .with_env_var("HOLDFAST_LOG")
        .try_from_env()
        .unwrap_or_else(|_| EnvFilter::new(level));
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !plain);
    // Only a second start could fail, and there is none.
    let started = if cli.global.json { builder.json().try_init() } else { builder.try_init() };
    drop(started);
}

fn serves(command: &Command) -> bool {
    matches!(
        command,
        Command::Server(ServerCommand::Run(_))
            | Command::Node(NodeCommand::Run(_))
            | Command::Edge(EdgeCommand::Run(_))
    )
}
