//! A registry's challenge, `WWW-Authenticate: Bearer realm="…",service="…",scope="…"`, and the token it leads to.
//!
//! A token is an anonymous one, or that of a [`Login`]. Tokens are kept in memory, never logged, sent to no other host
//! than the one that asked for them, and never used for a pull with another login, or with none.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use hyper::Uri;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// A token service's answer in bytes, at most.
pub(crate) const TOKEN_ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// How long a token is good for where the service does not say: the specification's minute.
const LIFETIME_DEFAULT: Duration = Duration::from_secs(60);
/// However long it is said to be good for, it is asked for again after this.
const LIFETIME_MAX: Duration = Duration::from_secs(15 * 60);
/// It is not used in its last moments.
const LIFETIME_MARGIN: Duration = Duration::from_secs(5);

/// A user and password for one registry, in memory that is wiped.
#[derive(Clone)]
pub struct Login {
    /// Tells logins apart; shown nowhere.
    id: [u8; 32],
    /// The value of the header that carries it.
    basic: Arc<Zeroizing<String>>,
}

impl Login {
    /// The login of a user.
    pub fn new(user: &[u8], password: &[u8]) -> Login {
        let mut pair = Zeroizing::new(Vec::with_capacity(user.len() + 1 + password.len()));
        pair.extend_from_slice(user);
        pair.push(b':');
        pair.extend_from_slice(password);
        let encoded = Zeroizing::new(BASE64.encode(&pair));
        let mut basic = Zeroizing::new(String::with_capacity("Basic ".len() + encoded.len()));
        basic.push_str("Basic ");
        basic.push_str(&encoded);
        Login { id: Sha256::digest(&*pair).into(), basic: Arc::new(basic) }
    }

    /// The header's value.
    pub(crate) fn header(&self) -> &str {
        &self.basic
    }

    /// What tells it apart, in memory only.
    pub(crate) fn id(&self) -> [u8; 32] {
        self.id
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(…)")
    }
}

/// Whether a challenge asks for user and password themselves.
pub(crate) fn asks_for_basic(challenge: &str) -> bool {
    challenge.trim().split(' ').next().is_some_and(|scheme| scheme.eq_ignore_ascii_case("basic"))
}

/// A bearer token with the time until which it may be used.
#[derive(Clone)]
pub(crate) struct Token {
    secret: String,
    use_until: Instant,
}

impl Token {
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.secret)
    }

    pub(crate) fn is_usable(&self, now: Instant) -> bool {
        now < self.use_until
    }

    /// Reads a token service's answer.
    pub(crate) fn parse(answer: &[u8], now: Instant) -> Option<Token> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        let answer: Answer = serde_json::from_slice(answer).ok()?;
        let secret = answer.token.or(answer.access_token)?;
        let printable = !secret.is_empty() && secret.bytes().all(|byte| byte.is_ascii_graphic());
        let lifetime = answer.expires_in.map_or(LIFETIME_DEFAULT, Duration::from_secs).min(LIFETIME_MAX);
        printable.then(|| Token { secret, use_until: now + lifetime.saturating_sub(LIFETIME_MARGIN) })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The address of the token service, from a challenge. `scope` is what we want, if the challenge names none.
pub(crate) fn token_address(challenge: &str, scope: &str) -> Option<Uri> {
    let (scheme, parameters) = challenge.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut asked_scope) = (None, None, None);
    for (name, value) in parameters_of(parameters)? {
        match name.to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => asked_scope = Some(value),
            _ => {}
        }
    }
    let realm = realm?;
    let mut address = format!("{realm}{}", if realm.contains('?') { '&' } else { '?' });
    if let Some(service) = service {
        address.push_str(&format!("service={}&", query_encoded(&service)));
    }
    address.push_str(&format!("scope={}", query_encoded(asked_scope.as_deref().unwrap_or(scope))));
    address.parse().ok()
}

/// `name=token` or `name="quoted, \"text\""`, divided by commas.
fn parameters_of(mut rest: &str) -> Option<Vec<(String, String)>> {
    let mut parameters = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return Some(parameters);
        }
        let (name, after) = rest.split_once('=')?;
        let value;
        (value, rest) = match after.strip_prefix('"') {
            Some(quoted) => quoted_text(quoted)?,
            None => {
                let end = after.find([',', ' ']).unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
        };
        parameters.push((name.trim().to_owned(), value));
    }
}

/// The text up to the closing quote, and what follows it.
fn quoted_text(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((text, &quoted[at + 1..])),
            '\\' => text.push(characters.next()?.1),
            _ => text.push(character),
        }
    }
    None
}

fn query_encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'/' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_lead_to_the_token_service() {
        let challenge = r#"Bearer realm="https://auth.example/token",service="reg, \"istry\"",scope="repository:a/b:pull""#;
        assert_eq!(
            token_address(challenge, "unused").unwrap().to_string(),
            "https://auth.example/token?service=reg%2C%20%22istry%22&scope=repository:a/b:pull"
        );
        assert_eq!(
            token_address("bearer realm=https://a.example/t?x=1", "repository:c:pull").unwrap().to_string(),
            "https://a.example/t?x=1&scope=repository:c:pull"
        );
        for bad in [
            "",
            "Basic realm=\"x\"",
            "Bearer service=\"x\"",
            "Bearer realm=\"unclosed",
            "Bearer realm=\"h t\"",
        ] {
            assert!(token_address(bad, "s").is_none(), "{bad}");
        }
    }

    #[test]
    fn i10_a_login_is_one_header_and_does_not_show() {
        let login = Login::new(b"Aladdin", b"open sesame");
        assert_eq!(login.header(), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert!(!format!("{login:?}").contains("QWxh"));
        assert_ne!(login.id(), Login::new(b"Aladdin", b"other").id());
        assert!(asks_for_basic("Basic realm=\"x\"") && asks_for_basic("basic"));
        assert!(!asks_for_basic("Bearer realm=\"basic\"") && !asks_for_basic(""));
    }

    #[test]
    fn tokens_expire_and_do_not_show() {
        let now = Instant::now();
        let token = Token::parse(br#"{"access_token":"s3cret","expires_in":99999}"#, now).unwrap();
        assert!(token.is_usable(now) && !token.is_usable(now + LIFETIME_MAX));
        assert!(!format!("{token:?}").contains("s3cret"));
        assert!(Token::parse(br#"{"token":"a\r\nb"}"#, now).is_none());
        assert!(Token::parse(b"{}", now).is_none());
    }

    proptest! {
        #[test]
        fn any_challenge_is_answered(challenge in "(Bearer )?[a-z=\", \\\\/:]{0,60}") {
            let _ = token_address(&challenge, "s");
        }
    }
}
