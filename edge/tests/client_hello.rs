//! The ClientHello reader against hellos that rustls makes, hellos built field by field, and noise.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use holdfast_edge::client_hello::{
    ClientHello, Ech, HELLO_BYTES_MAX, HelloError, HelloReader, Progress, RAW_BYTES_MAX, RECORD_BYTES_MAX,
    ReadHello, fuzz_client_hello,
};
use proptest::prelude::*;

mod support;
use support::tls::{self, Offer};

fn read(bytes: &[u8]) -> Result<Progress, HelloError> {
    HelloReader::new().push(bytes)
}

fn complete(bytes: &[u8]) -> ReadHello {
    match read(bytes) {
        Ok(Progress::Complete(read)) => read,
        other => panic!("{other:?}"),
    }
}

fn refused(bytes: &[u8]) -> HelloError {
    fuzz_client_hello(bytes);
    read(bytes).unwrap_err()
}

/// A hello's fields, encoded as RFC 8446 §4.1.2 has them.
#[derive(Clone)]
struct Fields {
    version: [u8; 2],
    session_id: Vec<u8>,
    cipher_suites: Vec<u8>,
    compression: Vec<u8>,
    extensions: Option<Vec<(u16, Vec<u8>)>>,
    after: Vec<u8>,
}

impl Fields {
    fn named(name: &str) -> Self {
        Self::with(vec![(0, server_name(&[(0, name.as_bytes())]))])
    }

    fn with(extensions: Vec<(u16, Vec<u8>)>) -> Self {
        Self {
            version: [3, 3],
            session_id: vec![7; 32],
            // A GREASE value first (RFC 8701), then TLS_AES_128_GCM_SHA256.
            cipher_suites: vec![0x2a, 0x2a, 0x13, 0x01],
            compression: vec![0],
            extensions: Some(extensions),
            after: Vec::new(),
        }
    }

    fn body(&self) -> Vec<u8> {
        let mut body = self.version.to_vec();
        body.extend_from_slice(&[9; 32]);
        body.push(self.session_id.len() as u8);
        body.extend_from_slice(&self.session_id);
        vector16(&mut body, &self.cipher_suites);
        body.push(self.compression.len() as u8);
        body.extend_from_slice(&self.compression);
        if let Some(extensions) = &self.extensions {
            let mut block = Vec::new();
            for (kind, data) in extensions {
                block.extend_from_slice(&kind.to_be_bytes());
                vector16(&mut block, data);
            }
            vector16(&mut body, &block);
        }
        body.extend_from_slice(&self.after);
        body
    }

    fn message(&self) -> Vec<u8> {
        message(1, &self.body())
    }

    fn records(&self) -> Vec<u8> {
        records(&self.message(), RECORD_BYTES_MAX)
    }
}

fn vector16(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(&(data.len() as u16).to_be_bytes());
    out.extend_from_slice(data);
}

fn server_name(names: &[(u8, &[u8])]) -> Vec<u8> {
    let mut list = Vec::new();
    for (kind, name) in names {
        list.push(*kind);
        vector16(&mut list, name);
    }
    let mut data = Vec::new();
    vector16(&mut data, &list);
    data
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend_from_slice(&(body.len() as u32).to_be_bytes()[1..]);
    message.extend_from_slice(body);
    message
}

/// The message in records of `size` bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for fragment in message.chunks(size) {
        out.extend_from_slice(&[22, 3, 1]);
        vector16(&mut out, fragment);
    }
    out
}

fn hello_of(bytes: &[u8]) -> ClientHello {
    let read = complete(bytes);
    assert_eq!(read.raw, bytes);
    read.hello
}

fn name_of(bytes: &[u8]) -> String {
    hello_of(bytes).server_name.unwrap().to_string()
}

#[test]
fn hellos_of_rustls_are_read_in_every_size() {
    let plain = tls::client_hello("app.example", Offer::default());
    assert_eq!((name_of(&plain), hello_of(&plain).records), ("app.example".into(), 1));
    let hybrid = tls::client_hello("app.example", Offer { hybrid: true, ..Offer::default() });
    assert_eq!(name_of(&hybrid), "app.example");
    assert!(hybrid.len() > plain.len() + 1216);
    let small_records = tls::client_hello("app.example", Offer { fragment: Some(64), ..Offer::default() });
    assert_eq!(name_of(&small_records), "app.example");
    assert!(hello_of(&small_records).records > 3);
    let large =
        tls::client_hello("app.example", Offer { alpn_bytes: 40_000, hybrid: true, ..Offer::default() });
    assert_eq!(name_of(&large), "app.example");
    assert!(large.len() > 40_000 && hello_of(&large).records == 3);
    for hello in [plain, hybrid, small_records, large] {
        fuzz_client_hello(&hello);
    }
}

#[test]
fn hellos_that_other_clients_sent_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hellos");
    let mut read = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "bin") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        fuzz_client_hello(&bytes);
        let name = hello_of(&bytes).server_name.map(|name| name.to_string());
        let want = (!path.to_string_lossy().contains("no-name")).then(|| "app.example".to_owned());
        assert_eq!(name, want, "{}", path.display());
        read += 1;
    }
    assert!(read >= 7, "{read} files");
}

#[test]
fn i08_every_spelling_of_a_name_reaches_the_same_route() {
    for name in ["app.example", "APP.example", "app.example.", "App.Example."] {
        assert_eq!(name_of(&Fields::named(name).records()), "app.example");
    }
    assert_eq!(name_of(&Fields::named("xn--bcher-kva.EXAMPLE").records()), "xn--bcher-kva.example");
}

#[test]
fn a_hello_without_a_name_is_complete_and_names_nobody() {
    let without = Fields::with(vec![(0x0a0a, vec![]), (43, vec![2, 3, 4])]);
    assert_eq!(hello_of(&without.records()).server_name, None);
    let mut legacy = Fields { version: [3, 1], extensions: None, ..without };
    assert_eq!(hello_of(&legacy.records()).server_name, None);
    legacy.session_id = Vec::new();
    assert_eq!(hello_of(&legacy.records()).server_name, None);
}

#[test]
fn a_hello_of_tls_1_2_and_older_is_routed_by_its_name() {
    // RFC 5246 §7.4.1.2: no session id, renegotiation_info by its cipher suite, two compression methods.
    let mut hello = Fields::named("app.example");
    (hello.session_id, hello.compression) = (Vec::new(), vec![1, 0]);
    hello.cipher_suites = vec![0xc0, 0x2f, 0x00, 0xff];
    hello.extensions.as_mut().unwrap().extend([
        (10, vec![0, 2, 0, 29]),
        (13, vec![0, 2, 4, 3]),
        (35, vec![]),
    ]);
    for minor in [1, 2, 3] {
        hello.version = [3, minor];
        assert_eq!(name_of(&hello.records()), "app.example");
    }
}

#[test]
fn grease_ech_and_unknown_extensions_pass() {
    let name = (0, server_name(&[(0, b"public.example")]));
    let ech = |data: Vec<u8>| {
        let fields = Fields::with(vec![(0x1a1a, vec![]), name.clone(), (0xfe0d, data), (0x3a3a, vec![0])]);
        hello_of(&fields.records())
    };
    let outer = ech(vec![0, 0, 1, 0, 1, 9, 0, 0, 0, 1, 5]);
    assert_eq!((outer.ech, outer.server_name.unwrap().as_str()), (Ech::Outer, "public.example"));
    assert_eq!(ech(vec![1]).ech, Ech::Inner);
    let other_name_types = server_name(&[(9, b"\xff\xfe"), (0, b"app.example"), (8, b"")]);
    assert_eq!(name_of(&Fields::with(vec![(0, other_name_types)]).records()), "app.example");
}

#[test]
fn i14_the_longest_hello_is_read_and_one_byte_more_is_refused_at_its_header() {
    let mut fields = Fields::named("app.example");
    let spare = HELLO_BYTES_MAX - fields.body().len() - 4;
    // Two bytes for the session id's and so on are counted; one extension fills the rest. Its length is 16 bit.
    fields.extensions.as_mut().unwrap().push((0x5a5a, vec![0; spare]));
    let block: usize = fields.extensions.as_ref().unwrap().iter().map(|(_, data)| data.len() + 4).sum();
    assert!(block <= usize::from(u16::MAX));
    assert_eq!(fields.body().len(), HELLO_BYTES_MAX);
    let hello = hello_of(&fields.records());
    assert_eq!((hello.length, hello.records), (HELLO_BYTES_MAX, 5));
    let one_byte_each = records(&fields.message(), 1);
    assert_eq!((hello_of(&one_byte_each).records, one_byte_each.len()), (HELLO_BYTES_MAX + 4, RAW_BYTES_MAX));

    let longer = [22, 3, 1, 0, 9, 1, 1, 0, 1];
    assert_eq!(refused(&longer), HelloError::HelloTooLong { length: HELLO_BYTES_MAX + 1 });
}

#[test]
fn i14_malformed_records_are_refused_with_their_own_error() {
    let good = Fields::named("app.example").message();
    assert_eq!(refused(b"GET / HTTP/1.1"), HelloError::NotTls { first_byte: b'G' });
    // RFC 8446 appendix D.5: an SSLv2 hello.
    assert_eq!(refused(&[0x80, 0x2e, 1, 3, 1]), HelloError::NotTls { first_byte: 0x80 });
    assert_eq!(refused(&[21, 3, 1]), HelloError::NotTls { first_byte: 21 });
    assert_eq!(refused(&[22, 2]), HelloError::RecordVersion { major: 2 });
    assert_eq!(refused(&[22, 3, 1, 0, 0]), HelloError::EmptyRecord);
    assert_eq!(refused(&[22, 3, 1, 0x40, 1]), HelloError::RecordTooLong { length: RECORD_BYTES_MAX + 1 });
    assert_eq!(refused(&[22, 3, 1, 0, 9, 2]), HelloError::NotClientHello { handshake_type: 2 });

    let mut interrupted = records(&good[..20], 20);
    interrupted.push(20);
    assert_eq!(refused(&interrupted), HelloError::InterruptedHello { content_type: 20 });
    let mut empty = records(&good[..20], 20);
    empty.extend_from_slice(&[22, 3, 1, 0, 0]);
    assert_eq!(refused(&empty), HelloError::EmptyRecord);

    let mut trailing = good.clone();
    trailing.extend_from_slice(&[11, 0]);
    assert_eq!(refused(&records(&trailing, 4096)), HelloError::TrailingHandshake { length: 2 });
    assert_eq!(refused(&records(&trailing, good.len() - 3)), HelloError::TrailingHandshake { length: 2 });
    // What follows in records of its own, such as early data, is the backend's.
    let mut early_data = records(&good, 50);
    early_data.extend_from_slice(&[23, 3, 3, 0, 1, 0]);
    assert_eq!(complete(&early_data).raw, early_data);
}

#[test]
fn i14_malformed_hellos_are_refused_with_their_own_error() {
    let name = || (0, server_name(&[(0, b"app.example")]));
    let fields = || Fields::named("app.example");
    let forbidden = |field, value| HelloError::Forbidden { field, value };
    let truncated = |field| HelloError::Truncated { field };
    let one = |data: Vec<u8>| Fields::with(vec![(0, data)]);
    let cases: Vec<(Fields, HelloError)> = vec![
        (Fields { version: [2, 0], ..fields() }, forbidden("legacy_version", 2)),
        (Fields { session_id: vec![0; 33], ..fields() }, forbidden("legacy_session_id", 33)),
        (Fields { cipher_suites: vec![], ..fields() }, forbidden("cipher_suites", 0)),
        (Fields { cipher_suites: vec![0; 3], ..fields() }, forbidden("cipher_suites", 3)),
        (Fields { compression: vec![], ..fields() }, forbidden("legacy_compression_methods", 0)),
        (Fields { after: vec![0], ..fields() }, HelloError::TrailingBytes { field: "extensions", length: 1 }),
        (Fields { after: vec![0], extensions: None, ..fields() }, truncated("extensions")),
        (Fields { after: vec![0, 3, 0, 0, 0], extensions: None, ..fields() }, truncated("extension data")),
        (Fields { after: vec![0, 1, 0], extensions: None, ..fields() }, truncated("extension type")),
        (Fields::with(vec![name(), name()]), HelloError::DuplicateExtension { extension: 0 }),
        (
            Fields::with(vec![name(), (0x7a7a, vec![]), (0x7a7a, vec![])]),
            HelloError::DuplicateExtension { extension: 0x7a7a },
        ),
        (Fields::with(vec![(41, vec![]), name()]), HelloError::PreSharedKeyNotLast),
        (one(server_name(&[(0, b"a.example"), (0, b"b.example")])), HelloError::TwoHostNames),
        (one(server_name(&[])), forbidden("server_name list", 2)),
        (one(server_name(&[(1, b"a.example")])), forbidden("server_name list", 14)),
        (one(vec![]), truncated("server_name list")),
        (one(vec![0, 4, 0, 0, 9, 0]), truncated("server_name")),
        (one(vec![0, 0, 0]), HelloError::TrailingBytes { field: "server_name list", length: 1 }),
        (one(server_name(&[(0, "bücher.example".as_bytes())])), HelloError::HostNameNotAscii),
        (one(server_name(&[(0, b"\xff.example")])), HelloError::HostNameNotAscii),
        (Fields::with(vec![(0xfe0d, vec![])]), truncated("encrypted_client_hello type")),
        (Fields::with(vec![(0xfe0d, vec![2])]), forbidden("encrypted_client_hello type", 2)),
        (
            Fields::with(vec![(0xfe0d, vec![1, 0])]),
            HelloError::TrailingBytes { field: "inner encrypted_client_hello", length: 1 },
        ),
    ];
    for (fields, want) in cases {
        assert_eq!(refused(&fields.records()), want);
    }
    for name in [
        "",
        ".",
        "localhost",
        "192.0.2.1",
        "[2001:db8::1]",
        "2001:db8::1",
        "a b.example",
        "a\0.example",
        "*.example",
    ] {
        let refused = refused(&Fields::named(name).records());
        assert!(matches!(refused, HelloError::HostName(_)), "{name:?}: {refused:?}");
    }
    assert_eq!(refused(&records(&message(1, &[]), 9)), truncated("legacy_version"));
}

proptest! {
    #[test]
    fn any_fragmentation_gives_the_same_answer(
        name in "[a-z]{1,20}(\\.[a-z]{1,20}){1,4}",
        padding in 0..5000_usize,
        record in 1..3000_usize,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut fields = Fields::named(&name);
        fields.extensions.as_mut().unwrap().insert(0, (21, vec![0; padding]));
        let mut bytes = records(&fields.message(), record);
        bytes.extend_from_slice(&tail);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.sort_unstable();
        cuts.push(bytes.len());
        let mut reader = HelloReader::new();
        let mut begin = 0;
        for cut in cuts {
            match reader.push(&bytes[begin..cut]).unwrap() {
                Progress::NeedMore(next) => reader = next,
                Progress::Complete(read) => {
                    prop_assert_eq!(read.hello.server_name.unwrap().to_string(), name);
                    prop_assert_eq!(read.raw, &bytes[..cut]);
                    return Ok(());
                }
            }
            begin = cut;
        }
        prop_assert!(false, "the hello was never complete");
    }

    #[test]
    fn a_truncated_hello_needs_more(record in 1..300_usize, cut: prop::sample::Index, hybrid: bool) {
        let hello = tls::client_hello("app.example", Offer { hybrid, fragment: Some(record + 31), ..Offer::default() });
        let kept = &hello[..cut.index(hello.len())];
        prop_assert!(matches!(read(kept), Ok(Progress::NeedMore(_))), "{} of {} bytes", kept.len(), hello.len());
    }

    #[test]
    fn i14_any_bytes_are_answered_and_memory_follows_what_was_sent(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz_client_hello(&bytes);
        if let Ok(Progress::NeedMore(reader)) = read(&bytes) {
            prop_assert!(reader.buffered_bytes() <= 2 * bytes.len().max(64));
        }
    }

    #[test]
    fn i14_a_hello_with_bytes_changed_is_answered(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), record in 20..600_usize,
    ) {
        let name = (0, server_name(&[(0, b"app.example")]));
        let mut message = Fields::with(vec![(43, vec![2, 3, 4]), name, (0xfe0d, vec![0; 9]), (41, vec![1; 5])]).message();
        for (at, byte) in &changes {
            let at = at.index(message.len());
            message[at] = *byte;
        }
        let mut bytes = records(&message, record);
        fuzz_client_hello(&bytes);
        for (at, byte) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        fuzz_client_hello(&bytes);
    }
}
