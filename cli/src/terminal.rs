//! What others wrote, made fit for a terminal: a workload's output must not move the cursor, change the title, or answer
//! back. Scripts get it as it is, with `--json`.

/// The text with everything that a terminal would obey, or that reorders what is read, in the form that Rust's strings
/// have: `\u{1b}`. Tabs stay.
pub(crate) fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character == '\t' || !(character.is_control() || reorders(character)) {
            out.push(character);
        } else {
            out.extend(character.escape_default());
        }
    }
    out
}

/// Marks that change the direction of what follows, and separators that some terminals take for line ends.
const fn reorders(character: char) -> bool {
    matches!(character, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i14_nothing_that_a_terminal_obeys_is_left() {
        let hostile = "\u{1b}[2J\u{1b}]0;title\u{7} a\rb\u{9b}31m \u{202e}txt\ttab é 漢\u{feff}";
        let shown = harmless(hostile);
        assert_eq!(shown, "\\u{1b}[2J\\u{1b}]0;title\\u{7} a\\rb\\u{9b}31m \\u{202e}txt\ttab é 漢\u{feff}");
        for code in (0..=0x9f_u32).filter(|code| !(0x20..0x7f).contains(code) && *code != 9) {
            let character = char::from_u32(code).unwrap();
            assert!(harmless(&character.to_string()).is_ascii(), "{code:x}");
        }
    }
}
