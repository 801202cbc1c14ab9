//! Cuts a stream of output into lines, and lines that are too long into pieces.

/// The most bytes of a line in one message; longer lines are cut.
pub const LINE_BYTES_MAX: usize = 16 * 1024;

/// A line, or a piece of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Without the newline, at most [`LINE_BYTES_MAX`] bytes.
    pub bytes: Vec<u8>,
    /// Whether the line goes on.
    pub continues: bool,
}

/// Holds the beginning of a line until its end arrives.
#[derive(Debug, Default)]
pub struct LineCutter {
    /// At most [`LINE_BYTES_MAX`] bytes.
    pending: Vec<u8>,
}

impl LineCutter {
    /// At the start of a line.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes output and hands every line and piece that is now complete to `emit`.
    pub fn push(&mut self, mut output: &[u8], mut emit: impl FnMut(Line)) {
        while let Some(first) = output.first() {
            if *first == b'\n' {
                emit(Line { bytes: std::mem::take(&mut self.pending), continues: false });
                output = output.get(1..).unwrap_or_default();
                continue;
            }
            if self.pending.len() == LINE_BYTES_MAX {
                emit(Line { bytes: std::mem::take(&mut self.pending), continues: true });
            }
            let room = LINE_BYTES_MAX - self.pending.len();
            let end =
                output.iter().take(room).position(|byte| *byte == b'\n').unwrap_or(room.min(output.len()));
            let (text, rest) = output.split_at(end);
            self.pending.extend_from_slice(text);
            output = rest;
        }
    }

    /// The stream ended: what is left is a line of its own.
    pub fn finish(&mut self) -> Option<Line> {
        (!self.pending.is_empty())
            .then(|| Line { bytes: std::mem::take(&mut self.pending), continues: false })
    }
}
