//! `cargo xtask openapi`: the API's description, generated from the code, is checked in and must be current.

use crate::step::Failure;
use crate::workspace::{cargo, root};

/// Writes `docs/reference/openapi.json`, or with `--check` compares it.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let check = match arguments {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return Err(Failure("usage: cargo xtask openapi [--check]".into())),
    };
    let path = root().join("docs/reference/openapi.json");
    let generated = generate()?;
    if check {
        let current = std::fs::read(&path).unwrap_or_default();
        if current == generated {
            return Ok(());
        }
        return Err(Failure(format!(
            "{} is not what the code says; run `cargo xtask openapi` and commit the result",
            path.display()
        )));
    }
    std::fs::write(&path, generated).map_err(|e| Failure(format!("cannot write {}: {e}", path.display())))
}

fn generate() -> Result<Vec<u8>, Failure> {
    let arguments = ["run", "--quiet", "--locked", "--package", "holdfast-cli", "--", "server", "openapi"];
    let output = cargo(&arguments)
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|e| Failure(format!("cannot start cargo: {e}")))?;
    if !output.status.success() {
        return Err(Failure(format!("`holdfast server openapi` ended with {}", output.status)));
    }
    Ok(output.stdout)
}
