//! What the project runs on itself: `cargo xtask demo`, `test`, `ci` and the rest.
//!
//! It depends on nothing of ours and on almost nothing of others, so that it starts at once on a fresh machine. It
//! installs Debian packages that are missing, never touches anything outside the repository otherwise, and ends with
//! the exit code of what it ran.

mod assets;
mod bench;
mod cpio;
mod demo;
mod fuzz;
mod openapi;
mod packages;
mod sim;
mod step;
mod test;
mod workspace;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask COMMAND

  demo                       builds everything, then the main job from end to end: deploy, lose the control plane, serve on
  test [-- ARGS]             builds everything, then format, lints, docs, every test and a short run of every fuzz target
  ci                         test, then demo: what .ci/run runs
  bench [NAME [ARGS]]        lists the benchmarks, or runs one
  assets                     builds what microVMs boot from: kernel, init, and the demo's web app
  openapi [--check]          writes docs/reference/openapi.json from the code, or checks that it is current
  fuzz [TARGET] [--seconds N] [--seed N]
                             runs one fuzz target, or all of them in turn
  sim --seed N | --seeds N [--from N] [--trace FILE] [--plant BUG]
                             runs whole simulated clusters, each from one seed
  packages                   installs the Debian packages that the above need
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let outcome = match command.as_str() {
        "demo" => demo::run(),
        "test" => test::run(&rest),
        "ci" => test::run(&[]).and_then(|()| demo::run()),
        "bench" => bench::run(&rest),
        "assets" => workspace::build_assets(),
        "openapi" => openapi::run(&rest),
        "fuzz" => fuzz::run(&rest),
        "sim" => sim::run(&rest),
        "packages" => packages::ensure(),
        "" | "help" | "--help" | "-h" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => {
            eprint!("There is no command «{other}».\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}
