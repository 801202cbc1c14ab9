//! Reads a TLS ClientHello off the wire, however it was cut into records and segments, and says which hostname it asks for.
//!
//! It never answers the client, never decrypts, never changes a byte: what was read is handed on whole, so that it
//! can be replayed to the backend. It refuses whatever the RFCs forbid, because a hello that the edge and a backend
//! could read differently is a way past the route's owner (I8), and no input makes it panic or grow past
//! [`RAW_BYTES_MAX`] (I14).
//!
//! The answer depends on the bytes alone, never on how they were fragmented: each byte is judged in order, and the
//! first prefix that is wrong decides the error.

mod body;

use holdfast_model::Hostname;
use holdfast_model::hostname::HostnameError;

/// The longest ClientHello, in bytes, without the four bytes of its handshake header (SPEC: 64 KiB).
pub const HELLO_BYTES_MAX: usize = 64 << 10;
/// The longest fragment of one record, in bytes.
// RFC 8446 §5.1: "The length MUST NOT exceed 2^14 bytes. An endpoint that receives a record that exceeds this
// length MUST terminate the connection with a "record_overflow" alert."
pub const RECORD_BYTES_MAX: usize = 1 << 14;
/// The most raw bytes that a hello can take: every byte of it in a record of its own.
pub const RAW_BYTES_MAX: usize = (HELLO_BYTES_MAX + HANDSHAKE_HEADER_BYTES) * (RECORD_HEADER_BYTES + 1);

const RECORD_HEADER_BYTES: usize = 5;
const HANDSHAKE_HEADER_BYTES: usize = 4;
// RFC 8446 §5.1: ContentType handshake(22); §4: HandshakeType client_hello(1).
const CONTENT_TYPE_HANDSHAKE: u8 = 22;
const HANDSHAKE_TYPE_CLIENT_HELLO: u8 = 1;
const VERSION_MAJOR: u8 = 3;

/// What the edge needs to know of a ClientHello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// The hostname of the `server_name` extension; with [`Ech::Outer`] this is the outer, public name.
    pub server_name: Option<Hostname>,
    /// Whether the client offers Encrypted Client Hello.
    pub ech: Ech,
    /// Length of the hello in bytes, without its handshake header.
    pub length: usize,
    /// Number of TLS records that carried it.
    pub records: usize,
}

/// What the hello says of Encrypted Client Hello (RFC 9849 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ech {
    /// No such extension.
    Absent,
    /// The hello is an outer one (or GREASE, which looks the same): its name is the public name.
    Outer,
    /// The hello says that it is the inner one, forwarded by a client-facing server.
    Inner,
}

/// A complete hello, and all bytes that were read to get it.
#[derive(Debug)]
pub struct ReadHello {
    /// What it says.
    pub hello: ClientHello,
    /// Every byte read so far, untouched and in order, also those behind the hello (such as early data).
    pub raw: Vec<u8>,
}

/// What came of some more bytes.
#[derive(Debug)]
pub enum Progress {
    /// All bytes so far are the beginning of a valid hello.
    NeedMore(HelloReader),
    /// The hello is complete.
    Complete(ReadHello),
}

/// Why bytes are not a ClientHello that the edge routes. The connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The first byte begins no TLS handshake record: HTTP, SSH, an SSLv2 hello, a port scan.
    #[error(
        "The connection does not begin with a TLS handshake record (first byte {first_byte:#04x}); use TLS on this port."
    )]
    NotTls {
        /// The byte.
        first_byte: u8,
    },
    /// A record whose version is of no TLS.
    #[error("A record says version major {major}, and TLS has only 3; use a TLS client.")]
    RecordVersion {
        /// The first byte of the version.
        major: u8,
    },
    /// A handshake record without content (RFC 8446 §5.1).
    #[error("A handshake record is empty, which RFC 8446 §5.1 forbids; fix the client.")]
    EmptyRecord,
    /// A record over [`RECORD_BYTES_MAX`].
    #[error("A record has {length} bytes, and TLS allows 16384; fix the client.")]
    RecordTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// Another kind of record between two pieces of the hello (RFC 8446 §5.1).
    #[error(
        "A record of type {content_type} interrupts the ClientHello, which RFC 8446 §5.1 forbids; fix the client."
    )]
    InterruptedHello {
        /// Its content type.
        content_type: u8,
    },
    /// The first handshake message is another one.
    #[error("The first handshake message has type {handshake_type} and is no ClientHello; fix the client.")]
    NotClientHello {
        /// Its handshake type.
        handshake_type: u8,
    },
    /// The hello is longer than [`HELLO_BYTES_MAX`].
    #[error(
        "The ClientHello has {length} bytes, and the edge takes at most 65536; offer fewer or smaller extensions."
    )]
    HelloTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// More handshake bytes follow the hello in its last record.
    #[error(
        "{length} handshake bytes follow the ClientHello in its own record, where none may; fix the client."
    )]
    TrailingHandshake {
        /// How many bytes.
        length: usize,
    },
    /// A field ends behind the end of what holds it.
    #[error("The ClientHello ends inside its {field}; fix the client.")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// A field has a length or a value that its definition does not allow.
    #[error(
        "The ClientHello's {field} has the value or length {value}, which its definition forbids; fix the client."
    )]
    Forbidden {
        /// The field.
        field: &'static str,
        /// The value or the length.
        value: usize,
    },
    /// Bytes are left where a structure has to end.
    #[error("{length} bytes follow the ClientHello's {field}, where none may; fix the client.")]
    TrailingBytes {
        /// The structure that should have been the last.
        field: &'static str,
        /// How many bytes.
        length: usize,
    },
    /// The same extension twice (RFC 8446 §4.2).
    #[error("The extension {extension} appears twice, which RFC 8446 §4.2 forbids; fix the client.")]
    DuplicateExtension {
        /// Its type.
        extension: u16,
    },
    /// An extension after `pre_shared_key` (RFC 8446 §4.2.11).
    #[error("The pre_shared_key extension is not the last one, as RFC 8446 §4.2.11 demands; fix the client.")]
    PreSharedKeyNotLast,
    /// Two host names in `server_name` (RFC 6066 §3).
    #[error("The server_name extension holds two host names, which RFC 6066 §3 forbids; fix the client.")]
    TwoHostNames,
    /// A host name in other bytes than ASCII (RFC 6066 §3).
    #[error("The host name in server_name is not ASCII, as RFC 6066 §3 demands; send A-labels (xn--…).")]
    HostNameNotAscii,
    /// A host name that can belong to no route.
    #[error("The host name in server_name can belong to no route; ask for the route's own hostname.")]
    HostName(#[source] HostnameError),
}

/// Takes bytes as they arrive until they make a whole ClientHello, or cannot.
#[derive(Debug, Default)]
pub struct HelloReader {
    raw: Vec<u8>,
    /// Bytes of `raw` that were judged.
    scanned: usize,
    position: Position,
    /// Content type and so on of the record being read; only its length is looked at again.
    record_length: usize,
    records: usize,
    message: Message,
}

/// Where in the stream of records the next byte is.
#[derive(Debug)]
enum Position {
    /// In a record's header, at this offset.
    Header(usize),
    /// In a record's fragment, with this many bytes to come.
    Fragment(usize),
}

impl Default for Position {
    fn default() -> Self {
        Self::Header(0)
    }
}

/// The handshake message that the fragments make up.
#[derive(Debug, Default)]
struct Message {
    /// Bytes of it seen so far, header included.
    seen: usize,
    /// The length from its header, as far as it was read.
    length: usize,
}

impl Message {
    /// Bytes still to come, once the header is known.
    fn left(&self) -> Option<usize> {
        (self.seen >= HANDSHAKE_HEADER_BYTES).then(|| HANDSHAKE_HEADER_BYTES + self.length - self.seen)
    }
}

impl HelloReader {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of memory that the reader holds for what it read.
    pub fn buffered_bytes(&self) -> usize {
        self.raw.capacity()
    }

    /// Takes the next bytes of the connection.
    ///
    /// # Errors
    /// [`HelloError`] as soon as no continuation can make the bytes a hello that the edge routes.
    pub fn push(mut self, bytes: &[u8]) -> Result<Progress, HelloError> {
        self.raw.extend_from_slice(bytes);
        while self.scanned < self.raw.len() {
            if self.message.left() == Some(0) {
                break;
            }
            match self.position {
                Position::Header(offset) => self.take_header_byte(offset)?,
                Position::Fragment(left) => self.take_fragment(left)?,
            }
        }
        if self.message.left() == Some(0) {
            self.complete().map(Progress::Complete)
        } else {
            Ok(Progress::NeedMore(self))
        }
    }

    fn take_header_byte(&mut self, offset: usize) -> Result<(), HelloError> {
        let byte = self.raw[self.scanned];
        match offset {
            0 if byte != CONTENT_TYPE_HANDSHAKE => {
                // RFC 8446 §5.1: "Handshake messages MUST NOT be interleaved with other record types."
                return Err(match self.records {
                    0 => HelloError::NotTls { first_byte: byte },
                    _ => HelloError::InterruptedHello { content_type: byte },
                });
            }
            // RFC 8446 §5.1: legacy_record_version is 0x0301 or 0x0303 and "MUST be ignored for all purposes"; what
            // is not even 3.x is another protocol whose first byte happens to be 22.
            1 if byte != VERSION_MAJOR => return Err(HelloError::RecordVersion { major: byte }),
            3 => self.record_length = usize::from(byte) << 8,
            4 => self.record_length |= usize::from(byte),
            _ => {}
        }
        self.scanned += 1;
        if offset + 1 < RECORD_HEADER_BYTES {
            self.position = Position::Header(offset + 1);
            return Ok(());
        }
        let length = self.record_length;
        if length == 0 {
            // RFC 8446 §5.1: "Implementations MUST NOT send zero-length fragments of Handshake types".
            return Err(HelloError::EmptyRecord);
        }
        if length > RECORD_BYTES_MAX {
            return Err(HelloError::RecordTooLong { length });
        }
        self.records += 1;
        self.position = Position::Fragment(length);
        self.check_last_record(length)
    }

    fn take_fragment(&mut self, left: usize) -> Result<(), HelloError> {
        let take = match self.message.left() {
            Some(wanted) => wanted.min(left).min(self.raw.len() - self.scanned),
            None => {
                self.take_message_header_byte()?;
                1
            }
        };
        self.scanned += take;
        self.message.seen += take;
        let left = left - take;
        self.position = if left == 0 { Position::Header(0) } else { Position::Fragment(left) };
        if self.message.seen == HANDSHAKE_HEADER_BYTES {
            if self.message.length > HELLO_BYTES_MAX {
                return Err(HelloError::HelloTooLong { length: self.message.length });
            }
            self.check_last_record(left)?;
        }
        Ok(())
    }

    fn take_message_header_byte(&mut self) -> Result<(), HelloError> {
        let byte = self.raw[self.scanned];
        match self.message.seen {
            0 if byte != HANDSHAKE_TYPE_CLIENT_HELLO => {
                Err(HelloError::NotClientHello { handshake_type: byte })
            }
            0 => Ok(()),
            _ => {
                self.message.length = self.message.length << 8 | usize::from(byte);
                Ok(())
            }
        }
    }

    /// Refuses a record that would hold more than the rest of the hello.
    // After its first ClientHello a client waits for the server, and early data has other keys: RFC 8446 §5.1,
    // "Handshake messages MUST NOT span key changes. Implementations MUST verify that all messages immediately
    // preceding a key change align with a record boundary".
    fn check_last_record(&self, left_in_record: usize) -> Result<(), HelloError> {
        match self.message.left() {
            Some(wanted) if left_in_record > wanted => {
                Err(HelloError::TrailingHandshake { length: left_in_record - wanted })
            }
            _ => Ok(()),
        }
    }

    fn complete(self) -> Result<ReadHello, HelloError> {
        let gathered;
        let message = if self.records == 1 {
            &self.raw[RECORD_HEADER_BYTES..self.scanned]
        } else {
            gathered = gather(&self.raw[..self.scanned], self.message.seen);
            gathered.as_slice()
        };
        let parsed = body::parse(&message[HANDSHAKE_HEADER_BYTES..])?;
        let hello = ClientHello {
            server_name: parsed.server_name,
            ech: parsed.ech,
            length: self.message.length,
            records: self.records,
        };
        Ok(ReadHello { hello, raw: self.raw })
    }
}

/// Joins the fragments of records whose headers were checked.
// RFC 8446 §5.1: handshake messages "MAY be [...] fragmented across several records".
fn gather(mut records: &[u8], message_bytes: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(message_bytes);
    while let Some((header, rest)) = records.split_first_chunk::<RECORD_HEADER_BYTES>() {
        let length = usize::from(u16::from_be_bytes([header[3], header[4]])).min(rest.len());
        message.extend_from_slice(&rest[..length]);
        records = &rest[length..];
    }
    message
}

/// Entry for a fuzz target: any bytes, once whole and once byte by byte, must get one and the same answer.
///
/// # Panics
/// When the answers differ or the bytes to replay are not those that were read: that is what the fuzzer looks for.
pub fn fuzz_client_hello(bytes: &[u8]) {
    let whole = HelloReader::new().push(bytes);
    let mut reader = HelloReader::new();
    for (read, byte) in bytes.iter().enumerate() {
        match (reader.push(std::slice::from_ref(byte)), &whole) {
            (Ok(Progress::NeedMore(next)), _) => reader = next,
            (Ok(Progress::Complete(stepped)), Ok(Progress::Complete(whole))) => {
                assert_eq!(stepped.hello, whole.hello, "the fragmentation changed the hello");
                assert_eq!(whole.raw, bytes, "the bytes to replay changed");
                assert_eq!(stepped.raw, bytes[..=read], "the bytes to replay changed");
                return;
            }
            (Err(stepped), Err(whole)) => {
                assert_eq!(&stepped, whole, "the fragmentation changed the error");
                return;
            }
            (stepped, whole) => panic!("byte by byte: {stepped:?}; whole: {whole:?}"),
        }
    }
    assert!(matches!(whole, Ok(Progress::NeedMore(_))), "byte by byte: need more; whole: {whole:?}");
}
