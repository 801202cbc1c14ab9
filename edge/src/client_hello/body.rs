//! The fields of a whole ClientHello (RFC 8446 §4.1.2, RFC 5246 §7.4.1.2), as far as routing needs them.
//!
//! Every length is checked against what holds it; values that only the endpoints negotiate are skipped unread, so
//! GREASE (RFC 8701) and algorithms yet to come pass. Keeps I14: no input panics.

use super::{Ech, HelloError, VERSION_MAJOR};
use holdfast_model::Hostname;

// RFC 6066 §3; RFC 8446 §4.2; RFC 9849 §5.
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_PRE_SHARED_KEY: u16 = 41;
const EXTENSION_ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
const NAME_TYPE_HOST_NAME: u8 = 0;
const ECH_TYPE_OUTER: u8 = 0;
const ECH_TYPE_INNER: u8 = 1;

/// What a hello's body says.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) server_name: Option<Hostname>,
    pub(super) ech: Ech,
}

/// Reads the body of a ClientHello.
pub(super) fn parse(body: &[u8]) -> Result<Body, HelloError> {
    let mut rest = Cursor(body);
    // RFC 8446 §4.1.2: legacy_version is 0x0303 in TLS 1.3; before, it is the highest version that the client
    // speaks. Which of them will do is for the backend to say.
    let major = rest.u8("legacy_version")?;
    if major != VERSION_MAJOR {
        return Err(HelloError::Forbidden { field: "legacy_version", value: usize::from(major) });
    }
    rest.u8("legacy_version")?;
    rest.bytes(32, "random")?;
    // RFC 8446 §4.1.2: opaque legacy_session_id<0..32>.
    let session_id = rest.vector8("legacy_session_id")?;
    if session_id.len() > 32 {
        return Err(HelloError::Forbidden { field: "legacy_session_id", value: session_id.len() });
    }
    // RFC 8446 §4.1.2: CipherSuite cipher_suites<2..2^16-2>, of two bytes each.
    let cipher_suites = rest.vector16("cipher_suites")?;
    if cipher_suites.len() < 2 || cipher_suites.len() % 2 != 0 {
        return Err(HelloError::Forbidden { field: "cipher_suites", value: cipher_suites.len() });
    }
    // RFC 8446 §4.1.2: opaque legacy_compression_methods<1..2^8-1>.
    if rest.vector8("legacy_compression_methods")?.is_empty() {
        return Err(HelloError::Forbidden { field: "legacy_compression_methods", value: 0 });
    }
    // RFC 8446 §4.1.2: "TLS 1.3 servers [...] may receive ClientHello messages without extensions"; RFC 5246
    // §7.4.1.2: their absence shows in that no bytes follow the compression methods.
    if rest.0.is_empty() {
        return Ok(Body { server_name: None, ech: Ech::Absent });
    }
    let extensions = rest.vector16("extensions")?;
    rest.end("extensions")?;
    parse_extensions(extensions)
}

fn parse_extensions(extensions: &[u8]) -> Result<Body, HelloError> {
    let mut rest = Cursor(extensions);
    let mut seen = SeenExtensions::new();
    let mut body = Body { server_name: None, ech: Ech::Absent };
    while !rest.0.is_empty() {
        let kind = rest.u16("extension type")?;
        let data = rest.vector16("extension data")?;
        // RFC 8446 §4.2: "There MUST NOT be more than one extension of the same type in a given extension block."
        if !seen.insert(kind) {
            return Err(HelloError::DuplicateExtension { extension: kind });
        }
        match kind {
            EXTENSION_SERVER_NAME => body.server_name = Some(parse_server_name(data)?),
            EXTENSION_ENCRYPTED_CLIENT_HELLO => body.ech = parse_ech(data)?,
            // RFC 8446 §4.2.11: "The "pre_shared_key" extension MUST be the last extension in the ClientHello [...]
            // Servers MUST check that it is the last extension".
            EXTENSION_PRE_SHARED_KEY if !rest.0.is_empty() => return Err(HelloError::PreSharedKeyNotLast),
            _ => {}
        }
    }
    Ok(body)
}

/// RFC 6066 §3: the list, `ServerName server_name_list<1..2^16-1>`.
fn parse_server_name(data: &[u8]) -> Result<Hostname, HelloError> {
    let mut rest = Cursor(data);
    let mut names = Cursor(rest.vector16("server_name list")?);
    rest.end("server_name list")?;
    let mut host_name = None;
    while !names.0.is_empty() {
        let name_type = names.u8("server_name type")?;
        // RFC 6066 §3: "all future data structures associated with new NameTypes MUST begin with a 16-bit length
        // field", so a name of another type can be stepped over.
        let name = names.vector16("server_name")?;
        if name_type != NAME_TYPE_HOST_NAME {
            continue;
        }
        // RFC 6066 §3: "The ServerNameList MUST NOT contain more than one name of the same name_type."
        if host_name.replace(name).is_some() {
            return Err(HelloError::TwoHostNames);
        }
    }
    let Some(host_name) = host_name else {
        return Err(HelloError::Forbidden { field: "server_name list", value: data.len() });
    };
    // RFC 6066 §3: opaque HostName<1..2^16-1>, "represented as a byte string using ASCII encoding without a
    // trailing dot", internationalised names as A-labels; "Literal IPv4 and IPv6 addresses are not permitted",
    // which Hostname refuses. One trailing dot, which some clients send, is taken off there too.
    let text = str::from_utf8(host_name).ok().filter(|t| t.is_ascii()).ok_or(HelloError::HostNameNotAscii)?;
    text.parse().map_err(HelloError::HostName)
}

/// RFC 9849 §5: the structure begins with ECHClientHelloType; the inner one holds nothing else.
fn parse_ech(data: &[u8]) -> Result<Ech, HelloError> {
    let mut rest = Cursor(data);
    match rest.u8("encrypted_client_hello type")? {
        ECH_TYPE_OUTER => Ok(Ech::Outer),
        ECH_TYPE_INNER => rest.end("inner encrypted_client_hello").map(|()| Ech::Inner),
        other => {
            Err(HelloError::Forbidden { field: "encrypted_client_hello type", value: usize::from(other) })
        }
    }
}

/// Which of the 2^16 extension types appeared: a bit each, so that a hello of sixteen thousand costs no more.
struct SeenExtensions([u64; 1 << 10]);

impl SeenExtensions {
    fn new() -> Self {
        Self([0; 1 << 10])
    }

    /// Whether the type is new.
    fn insert(&mut self, kind: u16) -> bool {
        let bit = 1_u64 << (kind % 64);
        let word = &mut self.0[usize::from(kind / 64)];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// The bytes that are left of a structure.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, length: usize, field: &'static str) -> Result<&'a [u8], HelloError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(HelloError::Truncated { field })?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, HelloError> {
        Ok(self.bytes(1, field)?[0])
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, HelloError> {
        let bytes = self.bytes(2, field)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// A vector whose length stands before it in one byte (RFC 8446 §3.4).
    fn vector8(&mut self, field: &'static str) -> Result<&'a [u8], HelloError> {
        let length = self.u8(field)?;
        self.bytes(usize::from(length), field)
    }

    /// A vector whose length stands before it in two bytes (RFC 8446 §3.4).
    fn vector16(&mut self, field: &'static str) -> Result<&'a [u8], HelloError> {
        let length = self.u16(field)?;
        self.bytes(usize::from(length), field)
    }

    fn end(&self, field: &'static str) -> Result<(), HelloError> {
        match self.0.len() {
            0 => Ok(()),
            length => Err(HelloError::TrailingBytes { field, length }),
        }
    }
}
