//! `cargo xtask bench`: what is measured, and how it is built. The measuring itself is `bench/`, a workspace of its own.

use crate::step::{Failure, run as run_command, step};
use crate::workspace::{cargo, root, target};
use std::path::PathBuf;
use std::process::Command;

/// The benchmarks and what each compares.
const BENCHMARKS: &[(&str, &str)] = &[
    (
        "raft",
        "Holdfast's replicated log beside Debian's etcd: three members each, the same disk, TLS; --help lists its flags",
    ),
    (
        "node",
        "the node agent: starts beside a QEMU started by hand, its memory, its restart beside 50 guests, and leaks after a \
         thousand instances between crashes; takes some of: start agent leaks",
    ),
    (
        "edge",
        "the edge beside Debian's HAProxy and nginx, with TLS passed through, one thread each; then its own tables of many \
         routes; takes --rounds, --seconds, --idle",
    ),
];

/// Instances that come and go while agents crash.
const CYCLES: &str = "1000";

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
        Some((name, rest)) if name == "node" => node(rest),
        Some((name, rest)) if name == "edge" => edge(rest),
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
    let built = build()?;
    let mut command = Command::new(built.join("release/bench-raft"));
    command.arg("--holdfast").arg(target().join("release/holdfast")).arg("--etcd").arg(etcd);
    command.arg("--revision").arg(revision()?);
    // Beside the build: the disk that the repository lies on is the one that is measured.
    command.arg("--folder").arg(built.join("data")).args(arguments);
    run_command(command.current_dir(root()))
}

/// Builds what measures; gives the folder that it is in.
fn build() -> Result<PathBuf, Failure> {
    let built = target().join("bench");
    step("build the benchmark", || {
        let mut command = cargo(&["build", "--quiet", "--locked", "--release", "--target-dir"]);
        run_command(command.arg(&built).current_dir(root().join("bench")))
    })?;
    Ok(built)
}

/// Routes that an edge's copy takes at most, and those that the table is to take.
const ROUTES: [&str; 2] = ["200000", "1000000"];

fn edge(arguments: &[String]) -> Result<(), Failure> {
    crate::packages::ensure()?;
    let built = build()?;
    let bench = |action: &str, folder: &str| {
        let mut command = Command::new(built.join("release/bench-edge"));
        command.arg(action).arg("--folder").arg(built.join("data").join(folder));
        command
    };
    step("compare", || run_command(bench("compare", "edge").args(arguments)))?;
    for routes in ROUTES {
        step("measure tables", || run_command(bench("routes", "routes").args(["--routes", routes])))?;
    }
    Ok(())
}

/// The node's figures are measured by its own tests, which know how to keep guests and crashes in namespaces of their own.
fn node(parts: &[String]) -> Result<(), Failure> {
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|one| one == part);
    if let Some(unknown) = parts.iter().find(|part| !["start", "agent", "leaks"].contains(&part.as_str())) {
        return Err(Failure(format!("the node's benchmark has no part «{unknown}»")));
    }
    crate::workspace::build_assets()?;
    if wanted("start") {
        step("measure starts", || measure("figures", "how_long_a_start_takes", &["--ignored"]))?;
    }
    if wanted("agent") {
        step("build holdfast as it is released", || {
            run_command(&mut cargo(&["build", "--locked", "--release", "--package", "holdfast-cli"]))
        })?;
        let test = "what_an_agent_takes_and_how_long_it_is_away";
        step("measure the agent beside its guests", || measure("figures", test, &["--ignored"]))?;
    }
    if wanted("leaks") {
        let test = "i05_instances_that_come_and_go_beside_crashes_leak_nothing";
        step("let instances come and go between crashes", || measure("crash", test, &[]))?;
    }
    Ok(())
}

fn measure(file: &str, test: &str, more: &[&str]) -> Result<(), Failure> {
    let mut command = cargo(&["test", "--quiet", "--locked", "--package", "holdfast-node", "--test", file]);
    command.args(["--", "--exact", "--nocapture", test]).args(more);
    command.env("HOLDFAST_ASSETS", crate::workspace::assets());
    command.env("HOLDFAST_BIN", target().join("release/holdfast"));
    command.env("HOLDFAST_CRASH_CYCLES", CYCLES);
    run_command(&mut command)
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
