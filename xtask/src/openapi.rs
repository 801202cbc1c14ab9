//! `cargo xtask openapi`: the API's description and the table of who may call what, made from the code, are checked in
//! and must be current.

use crate::step::Failure;
use crate::workspace::{cargo, root};

/// What is checked in, and the flag that makes `holdfast server openapi` print it.
const DOCUMENTS: [(&str, Option<&str>); 2] =
    [("docs/reference/openapi.json", None), ("docs/reference/access.md", Some("--access"))];

/// Writes the documents, or with `--check` compares them.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let check = match arguments {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return Err(Failure("usage: cargo xtask openapi [--check]".into())),
    };
    DOCUMENTS.iter().try_for_each(|(path, flag)| document(path, *flag, check))
}

fn document(path: &str, flag: Option<&str>, check: bool) -> Result<(), Failure> {
    let path = root().join(path);
    let generated = generate(flag)?;
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

fn generate(flag: Option<&str>) -> Result<Vec<u8>, Failure> {
    let arguments = ["run", "--quiet", "--locked", "--package", "holdfast-cli", "--", "server", "openapi"];
    let output = cargo(&arguments)
        .args(flag)
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|e| Failure(format!("cannot start cargo: {e}")))?;
    if !output.status.success() {
        return Err(Failure(format!("`holdfast server openapi` ended with {}", output.status)));
    }
    Ok(output.stdout)
}
