//! `holdfast-init`: PID 1 of a microVM. Mounts, says hello, is configured, sets up the network, starts one workload,
//! reaps, forwards its output, answers health checks, runs what somebody asks for beside it, and leaves by rebooting, which ends the VMM.
//!
//! One thread and one `poll` loop, no async runtime; health checks over the network run in a bounded number of
//! short-lived threads. It must never panic, block on its peer, or log a secret (I10, I14): a guest whose agent is
//! away, for however long, runs on (I5).

mod channel;
mod checks;
mod exec;
mod health;
mod mounts;
mod network;
mod outbox;
mod secrets;
mod supervisor;
mod workload;

use std::{io, thread, time::Duration};

use rustix::system::RebootCommand;

/// A step of the guest's start that failed.
#[derive(Debug, thiserror::Error)]
enum InitError {
    /// Something that a path or name was needed for.
    #[error("The guest's init could not {step} '{subject}'.")]
    Step {
        step: &'static str,
        subject: String,
        #[source]
        source: io::Error,
    },
    /// Nothing carries the channel.
    #[error(
        "The guest has neither a virtio-serial port named 'holdfast.channel' nor vsock; its VMM must offer one."
    )]
    NoChannel,
    /// No file system that the kernel knows.
    #[error("The root disk holds neither an erofs nor an ext4 file system.")]
    NoRoot(#[source] io::Error),
    /// A volume's place is taken.
    #[error(
        "The volume for '{path}' cannot be mounted there: it leads to '{place}', which the guest needs itself."
    )]
    ReservedMount { path: String, place: String },
    /// The image has no such user.
    #[error(
        "The image has no user or group named '{name}'; name one from its /etc/passwd and /etc/group, or use numbers."
    )]
    NoSuchUser { name: String },
    /// There is no program to run.
    #[error("The workload has no command; the image defines none, so the manifest must.")]
    NoCommand,
    /// The program could not be executed.
    #[error("The workload's program '{program}' could not be started.")]
    Exec {
        program: String,
        #[source]
        source: io::Error,
    },
}

impl InitError {
    /// For `map_err`: names the step and what it was about.
    fn at(step: &'static str, subject: impl Into<String>) -> impl FnOnce(io::Error) -> InitError {
        let subject = subject.into();
        move |source| InitError::Step { step, subject, source }
    }
}

/// An error with what caused it, as one line.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(" ({error})"));
        cause = error.source();
    }
    text
}

fn main() {
    if rustix::process::getpid() != rustix::process::Pid::INIT {
        eprintln!("holdfast-init is PID 1 of a microVM and does nothing elsewhere.");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        eprintln!("holdfast-init: {}", explain(&error));
    }
    leave();
}

fn run() -> Result<(), InitError> {
    mounts::mount_essentials()?;
    let channel = channel::Channel::open()?;
    supervisor::Supervisor::new(channel)?.run()
}

/// Ends the machine. PID 1 must not return: the kernel would panic, and the VMM's exit would look like a crash.
fn leave() -> ! {
    mounts::release_volumes();
    loop {
        if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
            eprintln!("holdfast-init: the guest could not reboot ({error})");
        }
        thread::sleep(Duration::from_secs(1));
    }
}
