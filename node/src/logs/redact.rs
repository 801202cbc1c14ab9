//! Known secret values are taken out of lines before anything is stored (I10).
//!
//! An automaton over all values of an instance (`aho-corasick`) reads each byte once, whatever the values and lines are,
//! so a tenant cannot make this slow. A line longer than 16 KiB comes in pieces; what of the earlier pieces may belong
//! to a value that goes on is remembered ([`Carry`]), so a value is found wherever it is cut. What has been stored
//! cannot be taken back: the end of a piece that may be the beginning of a value is taken out at once, from
//! [`PART_BYTES_MIN`] bytes on.

use std::fmt;
use std::ops::Range;

use aho_corasick::Anchored;
use aho_corasick::automaton::Automaton;
use aho_corasick::nfa::contiguous::NFA;
use data_encoding::BASE64;
use zeroize::Zeroizing;

/// What stands where a value was.
pub const REDACTED: &[u8] = b"[redacted]";

/// Values shorter than this are not looked for: they would be found in ordinary words, and taking them out would tell
/// them.
pub const VALUE_BYTES_MIN: usize = 6;

/// Values that are looked for at most: what SPEC allows in one bundle, and the lines of values with several lines.
pub const PATTERNS_MAX: usize = 4_096;

/// Bytes of all that is looked for at most: a bundle of the greatest size, as it is, in base64, and by lines.
pub const PATTERN_BYTES_MAX: usize = 1 << 20;

/// The end of a piece counts as the beginning of a value when it is at least this long.
pub const PART_BYTES_MIN: usize = 4;

/// Why an instance's values cannot be looked for.
#[derive(Debug, thiserror::Error)]
pub enum RedactError {
    /// There are too many.
    #[error(
        "An instance's secret values are more than {PATTERN_BYTES_MAX} bytes in {PATTERNS_MAX} parts, which no bundle may hold; its lines are not stored."
    )]
    TooMuch,
    /// The automaton could not be built.
    #[error("An instance's secret values cannot be looked for; its lines are not stored.")]
    Build(#[source] aho_corasick::BuildError),
}

/// The values that one instance knows. Cannot be printed.
pub struct Redactor {
    automaton: NFA,
    /// What is looked for, for the ends of pieces.
    patterns: Vec<Pattern>,
    /// The longest of them, in bytes.
    longest: usize,
}

struct Pattern {
    bytes: Zeroizing<Vec<u8>>,
    /// For each place, how much of the beginning ends there (Knuth, Morris and Pratt).
    borders: Vec<u32>,
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({} patterns, redacted)", self.patterns.len())
    }
}

/// What one stream has said of a line that goes on: as much as a value may begin in. Holds secrets.
#[derive(Default)]
pub struct Carry(Zeroizing<Vec<u8>>);

impl fmt::Debug for Carry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Carry({} bytes, redacted)", self.0.len())
    }
}

impl Redactor {
    /// Looks for these values, as they are and as the guest's file of secrets writes them in base64. A value with several
    /// lines is also looked for line by line. `None` when there is nothing to look for.
    ///
    /// # Errors
    /// When there is more than a bundle may hold.
    pub fn new<'v>(values: impl IntoIterator<Item = &'v [u8]>) -> Result<Option<Self>, RedactError> {
        let mut patterns: Vec<Zeroizing<Vec<u8>>> = Vec::new();
        let mut bytes = 0;
        for value in values {
            let encoded = Zeroizing::new(BASE64.encode(value).into_bytes());
            let lines = value.split(|byte| matches!(byte, b'\n' | b'\r'));
            for part in lines.chain([value, encoded.as_slice()]) {
                if part.len() >= VALUE_BYTES_MIN && !patterns.iter().any(|known| known.as_slice() == part) {
                    bytes += part.len();
                    patterns.push(Zeroizing::new(part.to_vec()));
                }
                if bytes > PATTERN_BYTES_MAX || patterns.len() > PATTERNS_MAX {
                    return Err(RedactError::TooMuch);
                }
            }
        }
        let Some(longest) = patterns.iter().map(|pattern| pattern.len()).max() else { return Ok(None) };
        let automaton = NFA::new(patterns.iter().map(|pattern| pattern.as_slice()));
        let automaton = automaton.map_err(RedactError::Build)?;
        let patterns = patterns.into_iter().map(Pattern::new).collect();
        Ok(Some(Self { automaton, patterns, longest }))
    }

    /// The piece without values. `continues`: the line goes on in the next piece of this stream.
    pub fn redact(&self, carry: &mut Carry, piece: &[u8], continues: bool) -> Vec<u8> {
        let before = carry.0.len();
        let whole = Zeroizing::new([carry.0.as_slice(), piece].concat());
        let mut found = self.matches(&whole);
        if continues {
            let part = self.part_at_end(&whole);
            if part >= PART_BYTES_MIN {
                found.push(whole.len() - part..whole.len());
            }
            let keep = whole.len().min(self.longest - 1);
            carry.0 = Zeroizing::new(whole.get(whole.len() - keep..).unwrap_or_default().to_vec());
        } else {
            *carry = Carry::default();
        }
        let spans = found.into_iter().filter(|span| span.end > before);
        cut(piece, spans.map(|span| span.start.saturating_sub(before)..span.end - before))
    }

    /// Every place where something ends that is looked for, with the longest of what ends there.
    fn matches(&self, text: &[u8]) -> Vec<Range<usize>> {
        let mut found: Vec<Range<usize>> = Vec::new();
        // The automaton has an unanchored start: it was built with the default, which is both.
        let Ok(mut state) = self.automaton.start_state(Anchored::No) else { return everything(text) };
        for (at, byte) in text.iter().enumerate() {
            state = self.automaton.next_state(Anchored::No, state, *byte);
            if !self.automaton.is_match(state) {
                continue;
            }
            let ends = 0..self.automaton.match_len(state).min(1);
            let length = ends.map(|nth| self.automaton.match_pattern(state, nth));
            let length = length.map(|pattern| self.automaton.pattern_len(pattern)).max().unwrap_or(0);
            let span = at + 1 - length..at + 1;
            match found.last_mut() {
                Some(last) if span.start <= last.end => {
                    last.start = last.start.min(span.start);
                    last.end = span.end;
                }
                _ => found.push(span),
            }
        }
        found
    }

    /// How much of the text's end is the beginning of something that is looked for.
    fn part_at_end(&self, text: &[u8]) -> usize {
        self.patterns.iter().map(|pattern| pattern.part_at_end(text)).max().unwrap_or(0)
    }
}

impl Pattern {
    fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        let mut borders = vec![0_u32; bytes.len()];
        let mut border = 0;
        for at in 1..bytes.len() {
            border = advance(&bytes, &borders, border, bytes[at]);
            borders[at] = u32::try_from(border).unwrap_or(0);
        }
        Self { bytes, borders }
    }

    /// How much of the end of `text` is a beginning of this, and not all of it.
    fn part_at_end(&self, text: &[u8]) -> usize {
        let from = text.len().saturating_sub(self.bytes.len() - 1);
        let mut matched = 0;
        for byte in text.get(from..).unwrap_or_default() {
            matched = advance(&self.bytes, &self.borders, matched, *byte);
        }
        matched
    }
}

/// How much of a pattern's beginning ends at the next byte, when `matched` of it ended before it.
fn advance(pattern: &[u8], borders: &[u32], mut matched: usize, byte: u8) -> usize {
    loop {
        if pattern.get(matched) == Some(&byte) {
            return matched + 1;
        }
        if matched == 0 {
            return 0;
        }
        matched = borders.get(matched - 1).map_or(0, |border| *border as usize);
    }
}

fn everything(text: &[u8]) -> Vec<Range<usize>> {
    std::iter::once(0..text.len()).collect()
}

/// `piece` with [`REDACTED`] in place of each of the spans, which are ordered by their ends and may overlap.
fn cut(piece: &[u8], spans: impl Iterator<Item = Range<usize>>) -> Vec<u8> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for mut span in spans {
        while let Some(last) = joined.pop_if(|last| span.start <= last.end) {
            span.start = span.start.min(last.start);
            span.end = span.end.max(last.end);
        }
        joined.push(span);
    }
    let mut out = Vec::with_capacity(piece.len());
    let mut at = 0;
    for span in joined {
        out.extend_from_slice(piece.get(at..span.start).unwrap_or_default());
        out.extend_from_slice(REDACTED);
        at = span.end;
    }
    out.extend_from_slice(piece.get(at..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn redactor(values: &[&str]) -> Redactor {
        Redactor::new(values.iter().map(|value| value.as_bytes())).unwrap().unwrap()
    }

    fn line(redactor: &Redactor, text: &str) -> String {
        String::from_utf8(redactor.redact(&mut Carry::default(), text.as_bytes(), false)).unwrap()
    }

    #[test]
    fn i10_values_are_taken_out_in_every_form_in_which_they_are_handed_out() {
        let values = redactor(&["hunter22", "first line of a key\nsecond line of a key\n", "geheim-é"]);
        assert_eq!(line(&values, "pw=hunter22, again hunter22"), "pw=[redacted], again [redacted]");
        assert_eq!(line(&values, "aHVudGVyMjI="), "[redacted]");
        assert_eq!(line(&values, "> second line of a key"), "> [redacted]");
        assert_eq!(line(&values, "hunterhunter22hunter2"), "hunter[redacted]hunter2");
        assert_eq!(line(&values, "geheim-é"), "[redacted]");
        assert_eq!(format!("{values:?}"), "Redactor(8 patterns, redacted)");
    }

    #[test]
    fn i10_values_that_overlap_leave_nothing_of_either() {
        let values = redactor(&["abcdefgh", "fghijklm", "defghi"]);
        assert_eq!(line(&values, "-abcdefghijklm-"), "-[redacted]-");
        assert_eq!(line(&values, "-defghijklm-"), "-[redacted]-");
    }

    #[test]
    fn values_that_would_be_found_in_words_are_not_looked_for() {
        assert!(Redactor::new([b"short".as_slice(), b""]).unwrap().is_some(), "its base64 is longer");
        assert!(Redactor::new([b"abc".as_slice()]).unwrap().is_none());
        let much = vec![b'x'; PATTERN_BYTES_MAX];
        assert!(matches!(Redactor::new([much.as_slice()]), Err(RedactError::TooMuch)));
    }

    /// A secret text over two letters and a line with it, so that beginnings and ends of values repeat within them.
    fn texts() -> impl Strategy<Value = (Vec<String>, String, Vec<usize>)> {
        let values = prop::collection::vec("[ab]{6,14}", 1..4);
        (values, "[ab]{0,80}", prop::collection::vec(1..12_usize, 1..12))
    }

    proptest! {
        #[test]
        fn i10_however_a_line_is_cut_no_value_is_left((values, text, cuts) in texts()) {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            let redactor = redactor(&values);
            // With values in it for sure.
            let text = format!("{text}{}{text}{}", values[0], values[values.len() - 1]);
            let mut carry = Carry::default();
            let mut rest = text.as_bytes();
            let mut cuts = cuts.iter().cycle();
            let mut left: Vec<u8> = Vec::new();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                left.extend(redactor.redact(&mut carry, piece, !after.is_empty()));
                rest = after;
            }
            let left = String::from_utf8(left).unwrap();
            for value in &values {
                prop_assert!(!left.contains(value), "{value} in {left}");
            }
            // In one piece exactly the bytes of values are gone.
            let mut secret = vec![false; text.len()];
            for value in &values {
                for at in 0..text.len() {
                    if text[at..].starts_with(value) {
                        secret[at..at + value.len()].fill(true);
                    }
                }
            }
            let kept: String = text.char_indices().filter(|(at, _)| !secret[*at]).map(|(_, c)| c).collect();
            prop_assert_eq!(line(&redactor, &text).replace("[redacted]", ""), kept);
        }

        #[test]
        fn i10_a_value_that_is_cut_once_leaves_less_than_a_part(at in 1..40_usize, before in "[xy]{0,20}") {
            let value = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGH";
            let redactor = redactor(&[value]);
            let mut carry = Carry::default();
            let first = format!("{before}{}", &value[..at]);
            let mut left = redactor.redact(&mut carry, first.as_bytes(), true);
            left.extend(redactor.redact(&mut carry, format!("{}!", &value[at..]).as_bytes(), false));
            let left = String::from_utf8(left).unwrap().replace("[redacted]", "");
            let seen = if at < PART_BYTES_MIN { at } else { 0 };
            prop_assert_eq!(left, format!("{before}{}!", &value[..seen]));
        }
    }
}
