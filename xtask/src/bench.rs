//! `cargo xtask bench`: what is measured, and how it is built. The measuring itself is `bench/`, a workspace of its own.

use crate::step::{Failure, run as run_command, step};
use crate::workspace::{cargo, root, target};
use std::path::PathBuf;
use std::process::Command;

/// The benchmarks and what each compares.
const BENCHMARKS: &[(&str, &str)] = &[(
    "raft",
    "Holdfast's replicated log beside Debian's etcd: three members each, the same disk, TLS; --help lists its flags",
)];

/// Lists the benchmarks, or runs one with the rest of the arguments.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    match arguments.split_first() {
        None => {
            for (name, what) in BENCHMARKS {
                println!("{name}: {what}");
            }
            Ok(())
        }
        Some((name, rest)) if name == "raft" => raft(rest),
        Some((name, _)) => {
            Err(Failure(format!("there is no benchmark «{name}»; `cargo xtask bench` lists them")))
        }
    }
}

fn raft(arguments: &[String]) -> Result<(), Failure> {
    let etcd = etcd()?;
    step("build holdfast as it is released", || {
        run_command(&mut cargo(&["build", "--locked", "--release", "--package", "holdfast-cli"]))
    })?;
    let built = target().join("bench");
    step("build the benchmark", || {
        let mut command = cargo(&["build", "--quiet", "--locked", "--release", "--target-dir"]);
        run_command(command.arg(&built).current_dir(root().join("bench")))
    })?;
    let mut command = Command::new(built.join("release/bench-raft"));
    command.arg("--holdfast").arg(target().join("release/holdfast")).arg("--etcd").arg(etcd);
    command.arg("--revision").arg(revision()?);
    // Beside the build: the disk that the repository lies on is the one that is measured.
    command.arg("--folder").arg(built.join("data")).args(arguments);
    run_command(command.current_dir(root()))
}

/// Debian's etcd, unpacked beside the build. Not installed: that would start it as a service.
fn etcd() -> Result<PathBuf, Failure> {
    let folder = target().join("bench/etcd");
    let program = folder.join("usr/bin/etcd");
    if program.is_file() {
        return Ok(program);
    }
    step("unpack Debian's etcd-server", || {
        std::fs::create_dir_all(&folder)
            .map_err(|e| Failure(format!("cannot make {}: {e}", folder.display())))?;
        run_command(Command::new("apt-get").args(["download", "etcd-server"]).current_dir(&folder))?;
        let entries = std::fs::read_dir(&folder)
            .map_err(|e| Failure(format!("cannot list {}: {e}", folder.display())))?;
        let mut archives = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
        let archive = archives.find(|path| path.extension().is_some_and(|x| x == "deb"));
        let archive = archive.ok_or_else(|| Failure("apt-get downloaded no etcd-server".into()))?;
        run_command(Command::new("dpkg").arg("-x").arg(archive).arg(&folder))
    })?;
    Ok(program)
}

/// What was just built.
fn revision() -> Result<String, Failure> {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(root()).output();
    let output = output.map_err(|e| Failure(format!("cannot start git: {e}")))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
