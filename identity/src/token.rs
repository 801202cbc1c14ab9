//! Bearer tokens and enrolment secrets: 256 random bits in a form that secret scanners recognise.
//!
//! A token is `holdfast_<kind>_`, 52 characters of lower-case base32 (RFC 4648 without padding) and a 6-character
//! checksum over all that precedes it. The checksum is no protection; it lets a scanner, and a person who mistyped,
//! tell a token from noise without asking anybody. Only [`Token::digest`] may be stored. A token is shown once, by
//! [`Token::reveal`], and redacts itself everywhere else (I10).

use std::fmt;

use data_encoding::BASE32_NOPAD;
use rand::TryRng;
use rand::rngs::SysRng;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Random bytes in a token.
pub const SECRET_BYTES: usize = 32;
/// Base32 characters that carry the secret.
const SECRET_CHARS: usize = 52;
/// Base32 characters of checksum.
const CHECKSUM_CHARS: usize = 6;
/// Digest bytes that yield the checksum's 30 bits.
const CHECKSUM_BYTES: usize = 4;
const CHECKSUM_PURPOSE: &str = "holdfast 2026-11 token checksum";

/// Why a token was refused. Never holds any of the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The text is not a token at all.
    #[error(
        "This is not a Holdfast token; tokens begin with `holdfast_op_`, `holdfast_tok_` or `holdfast_enr_`."
    )]
    Prefix,
    /// It begins like a token and is too short, too long, or has characters that no token has.
    #[error("The token is damaged; copy it again, whole, as it was printed.")]
    Form,
    /// The checksum does not match.
    #[error("The token has a typing error: its checksum does not match; copy it again as it was printed.")]
    Checksum,
    /// The system gave no randomness.
    #[error("A token could not be made because the system's random source failed; try again.")]
    Random,
}

/// What a token is for; the digest depends on it, so that one kind is never accepted as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// The operator's token that `holdfast server init` prints once.
    Operator,
    /// A user's or service principal's bearer token.
    Access,
    /// A single-use secret with which a member, node or edge joins.
    Enrolment,
    /// A single-use secret with which a program is run in an instance.
    Exec,
}

impl TokenKind {
    const ALL: [TokenKind; 4] =
        [TokenKind::Operator, TokenKind::Access, TokenKind::Enrolment, TokenKind::Exec];

    /// What every token of this kind begins with.
    pub fn prefix(self) -> &'static str {
        match self {
            TokenKind::Operator => "holdfast_op_",
            TokenKind::Access => "holdfast_tok_",
            TokenKind::Enrolment => "holdfast_enr_",
            TokenKind::Exec => "holdfast_exec_",
        }
    }

    /// The purpose that keys the stored digest. Part of the stored format: never changes.
    fn purpose(self) -> &'static str {
        match self {
            TokenKind::Operator => "holdfast 2026-11 operator token digest",
            TokenKind::Access => "holdfast 2026-11 access token digest",
            TokenKind::Enrolment => "holdfast 2026-11 enrolment secret digest",
            TokenKind::Exec => "holdfast 2026-11 exec grant secret digest",
        }
    }
}

/// A token in the clear, in memory only.
#[derive(Clone)]
pub struct Token {
    kind: TokenKind,
    secret: Zeroizing<[u8; SECRET_BYTES]>,
}

impl Token {
    /// Makes a new token from the system's randomness.
    ///
    /// # Errors
    /// [`TokenError::Random`] when there is none.
    pub fn generate(kind: TokenKind) -> Result<Token, TokenError> {
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        SysRng.try_fill_bytes(secret.as_mut_slice()).map_err(|_| TokenError::Random)?;
        Ok(Token { kind, secret })
    }

    /// Makes a token from given secret bytes, for a caller that drew them elsewhere.
    pub fn from_secret(kind: TokenKind, secret: [u8; SECRET_BYTES]) -> Token {
        Token { kind, secret: Zeroizing::new(secret) }
    }

    /// Reads a token exactly as [`Token::reveal`] writes it; nothing is trimmed or folded.
    ///
    /// # Errors
    /// [`TokenError`], which holds none of the text.
    pub fn parse(text: &str) -> Result<Token, TokenError> {
        let (kind, body) = TokenKind::ALL
            .into_iter()
            .find_map(|kind| text.strip_prefix(kind.prefix()).map(|body| (kind, body)))
            .ok_or(TokenError::Prefix)?;
        let characters = |byte: u8| matches!(byte, b'a'..=b'z' | b'2'..=b'7');
        if body.len() != SECRET_CHARS + CHECKSUM_CHARS || !body.bytes().all(characters) {
            return Err(TokenError::Form);
        }
        let (encoded, checksum) = body.split_at(SECRET_CHARS);
        if checksum_of(&text[..text.len() - CHECKSUM_CHARS]) != checksum {
            return Err(TokenError::Checksum);
        }
        let upper = Zeroizing::new(encoded.to_ascii_uppercase());
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        // Strict: the bits of the last character beyond the 256th must be zero, so every token has one spelling.
        match BASE32_NOPAD.decode_mut(upper.as_bytes(), secret.as_mut_slice()) {
            Ok(SECRET_BYTES) => Ok(Token { kind, secret }),
            _ => Err(TokenError::Form),
        }
    }

    /// What the token is for.
    pub fn kind(&self) -> TokenKind {
        self.kind
    }

    /// The token as text, for the one place that shows or sends it. Never log it.
    pub fn reveal(&self) -> Zeroizing<String> {
        let prefix = self.kind.prefix();
        let encoded = Zeroizing::new(BASE32_NOPAD.encode(self.secret.as_slice()));
        let mut text = Zeroizing::new(String::with_capacity(prefix.len() + SECRET_CHARS + CHECKSUM_CHARS));
        text.push_str(prefix);
        text.push_str(&encoded);
        text.make_ascii_lowercase();
        let checksum = checksum_of(&text);
        text.push_str(&checksum);
        text
    }

    /// What is stored and looked up in place of the token.
    pub fn digest(&self) -> TokenDigest {
        TokenDigest(blake3::derive_key(self.kind.purpose(), self.secret.as_slice()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}redacted)", self.kind.prefix())
    }
}

/// A keyed digest of a token. Compares in constant time.
#[derive(Clone, Copy)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// A digest that was stored.
    pub fn from_bytes(bytes: [u8; 32]) -> TokenDigest {
        TokenDigest(bytes)
    }

    /// The bytes to store.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for TokenDigest {
    fn eq(&self, other: &TokenDigest) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for TokenDigest {}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenDigest(..)")
    }
}

fn checksum_of(text: &str) -> String {
    let digest = blake3::derive_key(CHECKSUM_PURPOSE, text.as_bytes());
    let mut checksum = BASE32_NOPAD.encode(&digest[..CHECKSUM_BYTES]);
    checksum.truncate(CHECKSUM_CHARS);
    checksum.make_ascii_lowercase();
    checksum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> impl Strategy<Value = TokenKind> {
        (0..TokenKind::ALL.len()).prop_map(|index| TokenKind::ALL[index])
    }

    proptest! {
        #[test]
        fn round_trips(kind in kinds(), secret in any::<[u8; 32]>()) {
            let token = Token::from_secret(kind, secret);
            let text = token.reveal();
            prop_assert_eq!(text.len(), kind.prefix().len() + 58);
            let parsed = Token::parse(&text).unwrap();
            prop_assert_eq!(parsed.kind(), kind);
            prop_assert_eq!(parsed.digest(), token.digest());
            prop_assert_eq!(parsed.reveal(), text);
        }

        #[test]
        fn any_changed_character_is_noticed(secret in any::<[u8; 32]>(), at in 0..70usize, to in "[ -~]") {
            let text = Token::from_secret(TokenKind::Operator, secret).reveal().to_string();
            let mut changed = text.clone();
            changed.replace_range(at..=at, &to);
            if changed != text {
                prop_assert!(Token::parse(&changed).is_err());
            }
        }

        #[test]
        fn i14_any_text_is_answered(text in "(holdfast_(op|tok|enr|exec)_)?\\PC{0,80}") {
            if let Ok(token) = Token::parse(&text) {
                let again = token.reveal();
                prop_assert_eq!(again.as_str(), text.as_str());
            }
        }

        #[test]
        fn i10_neither_debug_nor_error_shows_the_secret(secret in any::<[u8; 32]>()) {
            let token = Token::from_secret(TokenKind::Access, secret);
            let text = token.reveal();
            prop_assert_eq!(format!("{token:?}"), "Token(holdfast_tok_redacted)");
            let error = Token::parse(&text[..text.len() - 1]).unwrap_err();
            let shown = format!("{error:?} {error}");
            prop_assert!(!shown.contains(&text[20..30]));
        }
    }

    #[test]
    fn kinds_never_share_a_digest() {
        let digests = TokenKind::ALL.map(|kind| Token::from_secret(kind, [7; 32]).digest());
        for (at, digest) in digests.iter().enumerate() {
            assert!(!digests[..at].contains(digest), "{:?}", TokenKind::ALL[at]);
        }
    }

    #[test]
    fn each_generated_token_is_new() {
        let one = Token::generate(TokenKind::Enrolment).unwrap();
        let two = Token::generate(TokenKind::Enrolment).unwrap();
        assert_ne!(one.reveal(), two.reveal());
    }

    #[test]
    fn stored_digest_is_stable() {
        // Golden: a change here would lock everybody out of a running cluster.
        let digest = Token::from_secret(TokenKind::Operator, [1; 32]).digest();
        assert_eq!(
            data_encoding::HEXLOWER.encode(digest.as_bytes()),
            "23f325905024afc364fcfa654205447c2ea0cf51aadf592599b69036877caf15"
        );
    }

    #[test]
    fn only_one_spelling_is_accepted() {
        let text = Token::from_secret(TokenKind::Access, [9; 32]).reveal().to_string();
        assert_eq!(Token::parse(&text.to_ascii_uppercase()).unwrap_err(), TokenError::Prefix);
        assert_eq!(Token::parse(&format!("{text} ")).unwrap_err(), TokenError::Form);
        assert_eq!(Token::parse(&format!(" {text}")).unwrap_err(), TokenError::Prefix);
        // The last secret character carries 4 spare bits: set one and repair the checksum.
        let stem = &text[..text.len() - CHECKSUM_CHARS];
        let last = stem.chars().last().unwrap();
        let next = if last == 'q' { 'r' } else { 'b' };
        let stem = format!("{}{next}", &stem[..stem.len() - 1]);
        assert_eq!(Token::parse(&format!("{stem}{}", checksum_of(&stem))).unwrap_err(), TokenError::Form);
    }
}
