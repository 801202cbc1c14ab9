//! The frames of a session, on their way between a person, a member and a node.
//!
//! They travel as in [`framing`], each of at most [`EXEC_FRAME_BYTES_MAX`]. Both
//! streams of a session, the person's and the node's, carry the same frames; a member passes them on and keeps none.
//! `Debug` shows how much was said and never what (I10).

use super::{EXEC_FRAME_BYTES_MAX, ExecEnd, ExecProgram, ExecSize};
use crate::framing::{self, Cutter, FramingError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A signal that may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecSignal {
    /// Interrupt.
    Int,
    /// Terminate.
    Term,
    /// Kill.
    Kill,
    /// Hang up.
    Hup,
}

/// From a person towards a program. New kinds are added at the end.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecInput {
    /// The first frame of a person's stream; it goes no further than the member.
    Open {
        /// The grant's secret.
        secret: String,
        /// What to run.
        program: ExecProgram,
    },
    /// Bytes for standard input.
    Stdin(Vec<u8>),
    /// No more of them follow.
    StdinEnds,
    /// The terminal has another size.
    Resize(ExecSize),
    /// A signal.
    Signal(ExecSignal),
    /// Nobody is there any more: the program is hung up, or killed at once.
    Close {
        /// Killed at once.
        kill: bool,
    },
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecStatus {
    /// It exited.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

/// From a program towards a person. New kinds are added at the end.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecOutput {
    /// The program runs.
    Started,
    /// Bytes of standard output, or of the terminal.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The program ended, and all its output came before.
    Exit(ExecStatus),
    /// The session ended: the last frame, whatever came before.
    Ended {
        /// How.
        end: ExecEnd,
        /// A sentence for people.
        reason: String,
    },
}

impl fmt::Debug for ExecInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { program, .. } => write!(f, "Open(secret redacted, {program:?})"),
            Self::Stdin(bytes) => write!(f, "Stdin({} bytes, redacted)", bytes.len()),
            Self::StdinEnds => f.write_str("StdinEnds"),
            Self::Resize(size) => write!(f, "Resize({size:?})"),
            Self::Signal(signal) => write!(f, "Signal({signal:?})"),
            Self::Close { kill } => write!(f, "Close(kill {kill})"),
        }
    }
}

impl fmt::Debug for ExecOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started => f.write_str("Started"),
            Self::Stdout(bytes) => write!(f, "Stdout({} bytes, redacted)", bytes.len()),
            Self::Stderr(bytes) => write!(f, "Stderr({} bytes, redacted)", bytes.len()),
            Self::Exit(status) => write!(f, "Exit({status:?})"),
            Self::Ended { end, reason } => write!(f, "Ended({end}, {reason:?})"),
        }
    }
}

/// Why a stream of frames cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecFrameError {
    /// Its announced length is beyond the bound.
    #[error("A frame of {length} bytes was announced and {EXEC_FRAME_BYTES_MAX} are the most.")]
    TooLong {
        /// The announced length.
        length: usize,
    },
    /// The bytes are no frame.
    #[error(
        "A frame of the exec stream could not be understood; use builds of the same release on both ends."
    )]
    Form,
}

impl From<FramingError> for ExecFrameError {
    fn from(error: FramingError) -> Self {
        match error {
            FramingError::TooLong { length } => Self::TooLong { length },
            FramingError::Postcard(_) | FramingError::Trailing => Self::Form,
        }
    }
}

/// A frame as it travels.
///
/// # Errors
/// [`ExecFrameError`] when it is longer than a frame may be.
pub fn encode<F: Serialize>(frame: &F) -> Result<Vec<u8>, ExecFrameError> {
    Ok(framing::encode(frame, EXEC_FRAME_BYTES_MAX)?)
}

/// Cuts a session's stream into frames. Holds one frame at most, and what came with its end.
#[derive(Default)]
pub struct ExecFrames(Cutter);

impl ExecFrames {
    /// Nothing has come yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what came next.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// The next whole frame; `None` until more comes.
    ///
    /// # Errors
    /// [`ExecFrameError`]; nothing can be read after it.
    pub fn next_frame<F: DeserializeOwned>(&mut self) -> Result<Option<F>, ExecFrameError> {
        Ok(self.0.next_frame(EXEC_FRAME_BYTES_MAX)?)
    }
}

/// Reads `bytes` as a stream of frames of both directions and forgets them: the entry point of the fuzz target. Whatever
/// it is given, it returns how many frames were well formed.
pub fn decode_untrusted(bytes: &[u8]) -> usize {
    fn count<F: DeserializeOwned>(bytes: &[u8]) -> usize {
        let mut frames = ExecFrames::new();
        frames.extend(bytes);
        std::iter::from_fn(|| frames.next_frame::<F>().ok().flatten()).count()
    }
    count::<ExecInput>(bytes) + count::<ExecOutput>(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{EXEC_CHUNK_BYTES_MAX, ExecCall, ExecTerminal};
    use super::*;
    use crate::{ExecGrantId, InstanceId};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn inputs() -> impl Strategy<Value = ExecInput> {
        let size = (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| ExecSize { rows, columns });
        let terminal = (".{0,20}", size.clone()).prop_map(|(kind, size)| ExecTerminal { kind, size });
        let program = (vec(".{0,40}", 0..4), proptest::option::of(terminal))
            .prop_map(|(argv, terminal)| ExecProgram { argv, terminal });
        prop_oneof![
            (".{0,80}", program).prop_map(|(secret, program)| ExecInput::Open { secret, program }),
            vec(any::<u8>(), 0..EXEC_CHUNK_BYTES_MAX).prop_map(ExecInput::Stdin),
            Just(ExecInput::StdinEnds),
            size.prop_map(ExecInput::Resize),
            Just(ExecInput::Signal(ExecSignal::Int)),
            any::<bool>().prop_map(|kill| ExecInput::Close { kill }),
        ]
    }

    proptest! {
        #[test]
        fn frames_arrive_however_the_stream_is_cut(
            sent in vec(inputs(), 1..6),
            sizes in vec(1usize..9_000, 1..5),
        ) {
            let stream: Vec<u8> = sent.iter().flat_map(|frame| encode(frame).unwrap()).collect();
            let (mut frames, mut arrived, mut rest) = (ExecFrames::new(), Vec::new(), stream.as_slice());
            for size in sizes.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at((*size).min(rest.len()));
                frames.extend(piece);
                while let Some(frame) = frames.next_frame::<ExecInput>().unwrap() {
                    arrived.push(frame);
                }
                rest = after;
            }
            prop_assert_eq!(arrived, sent);
        }

        #[test]
        fn i14_arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..4_096)) {
            decode_untrusted(&bytes);
        }

        #[test]
        fn i10_neither_content_nor_arguments_nor_the_secret_are_shown(secret in "[a-z]{12}") {
            let program = ExecProgram { argv: vec![secret.clone()], terminal: None };
            let call = ExecCall {
                grant: ExecGrantId::from_bits(1),
                instance: InstanceId::from_bits(2),
                member: "m:1".into(),
                program: program.clone(),
                ends_in_ms: 1,
            };
            let bytes = secret.as_bytes().to_vec();
            let shown = format!(
                "{program:?} {call:?} {:?} {:?} {:?}",
                ExecInput::Open { secret: secret.clone(), program: program.clone() },
                ExecInput::Stdin(bytes.clone()),
                ExecOutput::Stderr(bytes.clone()),
            );
            let (text, numbers) = (shown.contains(&secret), shown.contains(&format!("{bytes:?}")));
            prop_assert!(!text && !numbers, "{}", shown);
        }
    }

    #[test]
    fn i14_a_frame_beyond_the_bound_is_refused_on_both_ends() {
        let long = ExecInput::Stdin(vec![7; EXEC_FRAME_BYTES_MAX]);
        assert!(matches!(encode(&long), Err(ExecFrameError::TooLong { .. })));
        let mut frames = ExecFrames::new();
        frames.extend(&u32::MAX.to_be_bytes());
        let refused = frames.next_frame::<ExecInput>();
        assert_eq!(refused, Err(ExecFrameError::TooLong { length: u32::MAX as usize }));
    }
}
