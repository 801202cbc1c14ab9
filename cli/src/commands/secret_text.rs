//! Secrets on their way in and out: read from a file or standard input, never from a command line, where others see it.

use crate::failure::{Failure, with_sources};
use holdfast_identity::files::write_secret;
use std::io::{IsTerminal, Read};
use std::path::Path;
use zeroize::Zeroizing;

/// The longest secret that is read, in bytes.
const SECRET_BYTES_MAX: u64 = 4 << 10;

/// Reads a secret from `file`, or else from standard input, prompting when a person sits there.
pub(crate) fn read(file: Option<&Path>, what: &str, no_input: bool) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::new());
    match file {
        Some(path) => {
            let opened = std::fs::File::open(path).map_err(Failure::file("read", path))?;
            opened.take(SECRET_BYTES_MAX).read_to_string(&mut text).map_err(Failure::file("read", path))?;
        }
        None if std::io::stdin().is_terminal() => {
            if no_input {
                return Err(Failure::Usage(format!("The {what} must come from a file or standard input.")));
            }
            eprint!("{what}: ");
            let _echo = EchoOff::new();
            std::io::stdin().read_line(&mut text).map_err(Failure::file("read", "standard input"))?;
            eprintln!();
        }
        None => {
            let input = std::io::stdin().lock();
            input
                .take(SECRET_BYTES_MAX)
                .read_to_string(&mut text)
                .map_err(Failure::file("read", "standard input"))?;
        }
    }
    let trimmed = Zeroizing::new(text.trim().to_owned());
    if trimmed.is_empty() {
        return Err(Failure::Usage(format!("The {what} is empty.")));
    }
    Ok(trimmed)
}

/// Reads bytes as they are from `file`, or else from standard input. A person who sits there types one line, whose end
/// is not part of it.
pub(crate) fn read_raw(
    file: Option<&Path>,
    what: &str,
    no_input: bool,
    bytes_max: usize,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    if file.is_none() && std::io::stdin().is_terminal() {
        let typed = read(None, what, no_input)?;
        return Ok(Zeroizing::new(typed.as_bytes().to_vec()));
    }
    // Room for all at once: a buffer that grew would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(bytes_max + 1));
    let limit = bytes_max as u64 + 1;
    let (from, failed) = match file {
        Some(path) => {
            let opened = std::fs::File::open(path).map_err(Failure::file("read", path))?;
            (path, opened.take(limit).read_to_end(&mut bytes))
        }
        None => (Path::new("standard input"), std::io::stdin().lock().take(limit).read_to_end(&mut bytes)),
    };
    failed.map_err(Failure::file("read", from))?;
    if bytes.len() > bytes_max {
        return Err(Failure::Usage(format!("The {what} has more than {bytes_max} bytes.")));
    }
    Ok(bytes)
}

/// Writes a secret to a file for its owner alone.
pub(crate) fn write(path: &Path, secret: &str) -> Result<(), Failure> {
    write_secret(path, secret.as_bytes()).map_err(|e| Failure::Host(with_sources(&e)))
}

/// A terminal that does not echo, for as long as this lives.
struct EchoOff(Option<rustix::termios::Termios>);

impl EchoOff {
    fn new() -> Self {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let Ok(before) = tcgetattr(std::io::stdin()) else { return Self(None) };
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        match tcsetattr(std::io::stdin(), OptionalActions::Flush, &silent) {
            Ok(()) => Self(Some(before)),
            Err(_) => Self(None),
        }
    }
}

impl Drop for EchoOff {
    fn drop(&mut self) {
        use rustix::termios::{OptionalActions, tcsetattr};
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
