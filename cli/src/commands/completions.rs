//! `holdfast completions`: a script for the shell.

use crate::args::Cli;
use crate::failure::Failure;
use clap::CommandFactory;
use std::io::Write;

pub(crate) fn run(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "holdfast", &mut script);
    std::io::stdout().write_all(&script).map_err(Failure::Output)
}
