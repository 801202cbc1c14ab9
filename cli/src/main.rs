//! The holdfast binary: every role and every command.
//!
//! This crate reads command lines and files, calls the other crates and prints. It holds no rules of its own: what may
//! happen is decided by the cluster. It must never print or log secret material (I10), except a token or a join secret
//! that was just made, once, to whoever asked for it.

mod agents;
mod args;
mod assets;
mod commands;
mod dev;
mod failure;
mod login;
mod metrics;
mod output;
mod server;
mod session;
mod terminal;
mod trace;

use args::audit::AuditCommand;
use args::operator::{EdgeCommand, NodeCommand, Rebuild, ServerCommand};
use args::{Cli, Command};
use clap::Parser;
use failure::Failure;
use output::Output;
use session::Session;
use std::process::ExitCode;
use std::time::Duration;

// A member under load makes and drops many small things on several threads: this one takes an eighth of its time off a
// write (docs/benchmarks.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long a member that has ended may take to close its files.
const CLOSING_MAX: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    // Before anything else: the launcher of a VMM must be a process with one thread and nothing set up.
    holdfast_jail::launcher::enter_if_asked();
    let cli = Cli::parse();
    let output = Output::new(cli.global.json);
    if let Err(error) = no_core_dumps() {
        output.failure(&Failure::Host(format!("Core dumps could not be turned off: {error}.")));
        return ExitCode::FAILURE;
    }
    trace::start(&cli);
    let runtime = match runtime(&cli.command) {
        Ok(runtime) => runtime,
        Err(error) => {
            output.failure(&Failure::Host(format!("Cannot start: {error}.")));
            return ExitCode::FAILURE;
        }
    };
    let is_server = matches!(cli.command, Command::Server(ServerCommand::Run(_)));
    let outcome = runtime.block_on(run(cli, output));
    // A task that is stuck must not keep the process from ending.
    if is_server {
        // Its tasks hold the log and the state. Only a start after they were closed has nothing to verify.
        runtime.shutdown_timeout(CLOSING_MAX);
    } else {
        runtime.shutdown_background();
    }
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_closed_pipe() => ExitCode::SUCCESS,
        // It has said itself why it failed.
        Err(Failure::Program { code }) => ExitCode::from(code),
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.exit())
        }
    }
}

/// Every role and command may hold secrets: the kernel must not write their memory to a disk (I10), nor let another
/// process of the same user read it.
fn no_core_dumps() -> std::io::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Roles that serve get every core; a command gets one thread.
fn runtime(command: &Command) -> std::io::Result<tokio::runtime::Runtime> {
    let serves = matches!(
        command,
        Command::Server(ServerCommand::Run(_))
            | Command::Node(NodeCommand::Run(_))
            | Command::Edge(EdgeCommand::Run(_))
    );
    let mut builder = if serves {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    builder.enable_all().build()
}

async fn run(cli: Cli, output: Output) -> Result<(), Failure> {
    let global = cli.global;
    let session = || Session::open(&global);
    match cli.command {
        Command::Login(arguments) => commands::login::run(&global, arguments).await,
        Command::Org(command) => commands::org::run(&session()?, command).await,
        Command::App(command) => commands::app::run(&session()?, command).await,
        Command::Env(command) => commands::env::run(&session()?, command).await,
        Command::Deploy(arguments) => commands::deploy::run(&session()?, arguments).await,
        Command::Scale(arguments) => commands::scale::run(&session()?, arguments).await,
        Command::Route(command) => commands::route::run(&session()?, command).await,
        Command::Volume(command) => commands::volume::run(&session()?, command).await,
        Command::Secrets(command) => commands::secrets::run(&session()?, command).await,
        Command::Registry(command) => commands::registry::run(&session()?, command).await,
        Command::Instances(arguments) => commands::instances::run(&session()?, arguments).await,
        Command::Releases(arguments) => commands::releases::run(&session()?, arguments).await,
        Command::Deployments(arguments) => commands::deployments::run(&session()?, arguments).await,
        Command::Logs(arguments) => commands::logs::run(&session()?, arguments).await,
        Command::Exec(arguments) => commands::exec::run(&session()?, arguments).await,
        Command::Events(arguments) => commands::events::run(&session()?, arguments).await,
        Command::Audit(command) => match command {
            AuditCommand::Search(arguments) => commands::audit::search(&session()?, arguments).await,
            AuditCommand::Export(arguments) => commands::audit::export(&session()?, arguments).await,
            AuditCommand::Verify(arguments) => commands::audit_verify::run(output, &arguments),
        },
        Command::Status => commands::status::run(&session()?).await,
        Command::Token(command) => commands::token::run(&session()?, command).await,
        Command::Completions { shell } => commands::completions::run(shell),
        Command::Confirm(arguments) => commands::confirm::run(&session()?, arguments).await,
        Command::Doctor(arguments) => commands::doctor::run(&global, output, arguments).await,
        Command::Dev(arguments) => dev::run(arguments, output).await,
        Command::Server(command) => match command {
            ServerCommand::Init(arguments) => server::init(&output, arguments).await,
            ServerCommand::Join(arguments) => server::join(&output, global.no_input, arguments).await,
            ServerCommand::Run(arguments) => server::run(arguments).await,
            ServerCommand::Invite(arguments) => commands::invite::run(&session()?, arguments).await,
            ServerCommand::List(arguments) => commands::members::list(&session()?, arguments).await,
            ServerCommand::Remove(arguments) => commands::members::remove(&session()?, arguments).await,
            ServerCommand::Promote { member } => {
                commands::members::set_votes(&session()?, &member, true).await
            }
            ServerCommand::Demote { member } => {
                commands::members::set_votes(&session()?, &member, false).await
            }
            ServerCommand::TransferLeader { member } => {
                commands::members::transfer_leader(&session()?, member).await
            }
            ServerCommand::Sealing => commands::sealing::show(&session()?).await,
            ServerCommand::RotateSealing(wait) => commands::sealing::rotate(&session()?, wait).await,
            ServerCommand::Verify(arguments) => match arguments.data_dir {
                Some(data_dir) => server::offline::verify(&output, &data_dir),
                None => commands::members::verify(&session()?).await,
            },
            ServerCommand::Rebuild(Rebuild { data_dir: Some(data_dir), to }) => {
                server::offline::rebuild(&output, &data_dir, to)
            }
            ServerCommand::Rebuild(Rebuild { data_dir: None, to }) => {
                commands::members::rebuild(&session()?, to).await
            }
            ServerCommand::Recover(arguments) => server::offline::recover(&output, &arguments),
            ServerCommand::Openapi { access } => commands::openapi::run(access),
        },
        Command::Node(command) => match command {
            NodeCommand::Join(arguments) => agents::node::join(arguments, &global, output).await,
            NodeCommand::Run(arguments) => agents::node::run(arguments).await,
            NodeCommand::Status(arguments) => agents::node::status(arguments, output).await,
            NodeCommand::Wipe(arguments) => agents::node::wipe(arguments, output).await,
            NodeCommand::List => commands::node::list(&session()?).await,
            NodeCommand::Drain { node } => commands::node::drain(&session()?, &node).await,
            NodeCommand::Cordon { node } => commands::node::cordon(&session()?, &node).await,
            NodeCommand::Quarantine { node } => commands::node::quarantine(&session()?, &node).await,
            NodeCommand::Activate { node } => commands::node::activate(&session()?, &node).await,
        },
        Command::Edge(command) => match command {
            EdgeCommand::Join(arguments) => agents::edge::join(arguments, &global, output).await,
            EdgeCommand::Run(arguments) => agents::edge::run(arguments).await,
            EdgeCommand::Status(arguments) => agents::edge::status(arguments, output).await,
            EdgeCommand::List => commands::edge::list(&session()?).await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
