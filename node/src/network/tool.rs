//! Runs `ip`, `tc` and `nft`: bounded in time, with their words in the error.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::NetworkError;

/// How long one command may take.
pub(super) const COMMAND_DEADLINE: Duration = Duration::from_secs(20);

/// Bytes of an error output that are repeated.
const SAID_BYTES_MAX: usize = 512;

/// A program of the host's.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tool {
    /// Links, addresses, routes.
    Ip,
    /// Queues.
    Tc,
    /// Packet filters.
    Nft,
}

impl Tool {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Tool::Ip => "ip",
            Tool::Tc => "tc",
            Tool::Nft => "nft",
        }
    }

    /// The package that has it.
    const fn package(self) -> &'static str {
        match self {
            Tool::Ip | Tool::Tc => "iproute2",
            Tool::Nft => "nftables",
        }
    }

    /// Runs it and answers with what it printed.
    pub(super) async fn run(
        self,
        arguments: &[&str],
        input: Option<String>,
    ) -> Result<Vec<u8>, NetworkError> {
        let command = || match &input {
            Some(input) => format!("{}: {}", self.name(), input.trim_end().replace('\n', "; ")),
            None => format!("{} {}", self.name(), arguments.join(" ")),
        };
        let spawn = |source| NetworkError::Spawn { program: self.name(), package: self.package(), source };
        let mut child = Command::new(self.name())
            .args(arguments)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(spawn)?;
        let run = async {
            if let (Some(mut stdin), Some(input)) = (child.stdin.take(), &input) {
                // A process that ended early says why on its error output.
                stdin.write_all(input.as_bytes()).await.ok();
            }
            child.wait_with_output().await
        };
        let output = match tokio::time::timeout(COMMAND_DEADLINE, run).await {
            Ok(output) => output.map_err(spawn)?,
            Err(_) => return Err(NetworkError::Deadline { command: command() }),
        };
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = output.stderr.get(..SAID_BYTES_MAX).unwrap_or(&output.stderr);
        let said = String::from_utf8_lossy(said).trim().replace(char::is_control, " ");
        Err(NetworkError::Refused { command: command(), said })
    }
}
