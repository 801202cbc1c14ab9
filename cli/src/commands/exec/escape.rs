//! The way out of a session that hangs: `~.` at the beginning of a line, as with ssh. `~~` there is one `~`.

/// What was typed comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// Bytes for the program.
    Text(Vec<u8>),
    /// The person leaves.
    Leave,
}

/// Where in a line the typing is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    #[default]
    LineStart,
    Tilde,
    Line,
}

/// Watches what is typed.
#[derive(Debug, Default)]
pub(super) struct Escapes {
    at: At,
}

impl Escapes {
    /// What goes on to the program.
    pub(super) fn pass(&mut self, typed: Vec<u8>) -> Typed {
        let mut text = Vec::with_capacity(typed.len() + 1);
        for byte in typed {
            match (self.at, byte) {
                (At::LineStart, b'~') => {
                    self.at = At::Tilde;
                    continue;
                }
                (At::Tilde, b'.') => return Typed::Leave,
                (At::Tilde, b'~') => {}
                (At::Tilde, _) => text.push(b'~'),
                (At::LineStart | At::Line, _) => {}
            }
            self.at = if matches!(byte, b'\r' | b'\n') { At::LineStart } else { At::Line };
            text.push(byte);
        }
        Typed::Text(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(pieces: &[&str]) -> Option<String> {
        let mut escapes = Escapes::default();
        let mut all = String::new();
        for piece in pieces {
            match escapes.pass(piece.as_bytes().to_vec()) {
                Typed::Text(bytes) => all.push_str(std::str::from_utf8(&bytes).unwrap()),
                Typed::Leave => return None,
            }
        }
        Some(all)
    }

    #[test]
    fn only_a_tilde_and_a_dot_at_the_beginning_of_a_line_leave() {
        for leaves in [&["~."][..], &["ls\r~."], &["ls\r", "~", "."], &["a\n~."]] {
            assert_eq!(typed(leaves), None, "{leaves:?}");
        }
        for (stays, passed) in [
            ("a~.", "a~."),
            ("~~.", "~."),
            ("~a.\r", "~a.\r"),
            ("ls ~/.config\r", "ls ~/.config\r"),
            ("~\r~x", "~\r~x"),
        ] {
            assert_eq!(typed(&[stays]).as_deref(), Some(passed), "{stays}");
        }
    }
}
