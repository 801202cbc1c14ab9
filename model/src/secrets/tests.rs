use super::*;
use proptest::prelude::*;

fn value(bytes: &[u8]) -> SecretValue {
    SecretValue::new(Zeroizing::new(bytes.to_vec()))
}

fn bundle(secrets: &[(&str, &[u8])]) -> Bundle {
    let mut bundle = Bundle::default();
    for (key, bytes) in secrets {
        bundle.add(key.parse().unwrap(), value(bytes)).unwrap();
    }
    bundle
}

#[test]
fn the_file_is_what_the_format_says_byte_by_byte() {
    let made = bundle(&[
        ("ZED", b"last"),
        ("A", b" two words, \"quoted\" = kept "),
        ("_UNDER", b""),
        ("LINES", b"one\ntwo"),
        ("RAW", &[0xff, 0x00]),
        ("PREFIXED", b"base64:AAAA"),
        ("CR", b"a\r"),
    ]);
    let expected = "# HOLDFAST_SECRETS_V1\n\
        A= two words, \"quoted\" = kept \n\
        CR=base64:YQ0=\n\
        LINES=base64:b25lCnR3bw==\n\
        PREFIXED=base64:YmFzZTY0OkFBQUE=\n\
        RAW=base64:/wA=\n\
        ZED=last\n\
        _UNDER=\n";
    assert_eq!(std::str::from_utf8(&made.to_file()).unwrap(), expected);
    assert_eq!(
        data_encoding::HEXLOWER.encode(&made.digest()),
        data_encoding::HEXLOWER.encode(&Sha256::digest(expected.as_bytes()))
    );
    assert_eq!(&*Bundle::default().to_file(), b"# HOLDFAST_SECRETS_V1\n");
}

#[test]
fn only_the_canonical_file_is_read_as_one() {
    let good: &[u8] = b"# HOLDFAST_SECRETS_V1\nA=1\nB=2\n";
    assert!(Bundle::from_file(good).is_ok());
    for bad in [
        &b""[..],
        b"A=1\n",
        b"# HOLDFAST_SECRETS_V2\nA=1\n",
        b"# HOLDFAST_SECRETS_V1\nA=1",
        b"# HOLDFAST_SECRETS_V1\nB=2\nA=1\n",
        b"# HOLDFAST_SECRETS_V1\nA=1\nA=1\n",
        b"# HOLDFAST_SECRETS_V1\r\nA=1\n",
        b"# HOLDFAST_SECRETS_V1\n\nA=1\n",
        b"# HOLDFAST_SECRETS_V1\na=1\n",
        b"# HOLDFAST_SECRETS_V1\nA\n",
        // Base64 where none is needed, or with the wrong padding.
        b"# HOLDFAST_SECRETS_V1\nA=base64:YQ==\n",
        b"# HOLDFAST_SECRETS_V1\nA=base64:YQ0\n",
        b"# HOLDFAST_SECRETS_V1\nA=\xff\n",
        b"# HOLDFAST_SECRETS_V1\nA=a\rb\n",
    ] {
        assert!(Bundle::from_file(bad).is_err(), "{}", String::from_utf8_lossy(bad));
    }
}

#[test]
fn what_a_person_writes_is_imported_and_duplicates_are_refused() {
    let made = Bundle::import(b"# mine\n\nB=2\nA=base64:AA==\n").unwrap();
    assert_eq!(made, bundle(&[("A", &[0]), ("B", b"2")]));
    assert_eq!(Bundle::import(b"A=1\nA=2\n"), Err(SecretsError::Twice("A".parse().unwrap())));
    assert_eq!(Bundle::import(b"A=1\nhunter2\n"), Err(SecretsError::Line(2)));
}

#[test]
fn the_limits_are_exact() {
    let long = value(&vec![b'x'; SECRET_VALUE_BYTES_MAX]);
    let key = |n: usize| format!("K{n}").parse::<SecretKey>().unwrap();
    assert!(Bundle::default().add(key(0), long.clone()).is_ok());
    let longer = value(&vec![b'x'; SECRET_VALUE_BYTES_MAX + 1]);
    assert_eq!(Bundle::default().add(key(0), longer), Err(SecretsError::ValueTooLong(key(0))));
    let mut full = Bundle::default();
    for n in 0..3 {
        full.add(key(n), long.clone()).unwrap();
    }
    // What is left of 256 KiB, to the byte.
    let left = SECRETS_FILE_BYTES_MAX - full.to_file().len() - "LAST=\n".len();
    let mut over = full.clone();
    assert_eq!(over.add("LAST".parse().unwrap(), value(&vec![b'x'; left + 1])), Err(SecretsError::TooLong));
    full.add("LAST".parse().unwrap(), value(&vec![b'x'; left])).unwrap();
    assert_eq!(full.to_file().len(), SECRETS_FILE_BYTES_MAX);
    let mut many = Bundle::default();
    for n in 0..SECRETS_MAX {
        many.add(key(n), value(b"")).unwrap();
    }
    assert_eq!(many.add(key(SECRETS_MAX), value(b"")), Err(SecretsError::TooManyKeys));
    assert!("A".repeat(SECRET_KEY_BYTES_MAX).parse::<SecretKey>().is_ok());
    for bad in ["", "a", "1A", "A-B", "A B", &"A".repeat(SECRET_KEY_BYTES_MAX + 1)] {
        assert!(bad.parse::<SecretKey>().is_err(), "{bad}");
    }
}

#[test]
fn i10_nothing_shows_a_value() {
    let made = bundle(&[("A", b"hunter2")]);
    assert!(!format!("{made:?}").contains("hunter2"));
    let error = Bundle::import(b"A=base64:hunter2!").unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    let error = Bundle::import("hunter2-é\n".as_bytes()).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    for json in ["\"hunter2-hunter2\"", "4711", "-4711", "47.11"] {
        let error = format!("{:?}", serde_json::from_str::<SecretValue>(json).unwrap_err());
        assert!(!error.contains("hunter2") && !error.contains("47"), "{error}");
    }
}

fn any_bundle() -> impl Strategy<Value = Bundle> {
    let bytes = prop_oneof![
        any::<String>().prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..40),
        "(base64:)?[A-Za-z0-9+/=\\n]{0,12}".prop_map(String::into_bytes),
    ];
    proptest::collection::btree_map("[A-Z_][A-Z0-9_]{0,6}", bytes, 0..8).prop_map(|map| {
        let mut bundle = Bundle::default();
        for (key, bytes) in map {
            bundle.add(key.parse().unwrap(), value(&bytes)).unwrap();
        }
        bundle
    })
}

proptest! {
    #[test]
    fn a_bundle_survives_its_file_and_the_file_is_one(made in any_bundle()) {
        let file = made.to_file();
        let again = Bundle::from_file(&file).unwrap();
        prop_assert_eq!(&again, &made);
        prop_assert_eq!(&*again.to_file(), &*file);
        prop_assert_eq!(&Bundle::import(&file).unwrap(), &made);
        prop_assert!(file.ends_with(b"\n"));
        prop_assert_eq!(file.iter().filter(|b| **b == b'\n').count(), made.iter().count() + 1);
    }

    #[test]
    fn i14_no_bytes_panic_and_what_is_read_is_canonical(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        let framed = [HEADER.as_bytes(), b"\n", &bytes].concat();
        for file in [&bytes, &framed] {
            let _ = Bundle::import(file);
            if let Ok(read) = Bundle::from_file(file) {
                prop_assert_eq!(&*read.to_file(), &file[..]);
            }
        }
    }

    #[test]
    fn a_value_survives_json_and_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        let json = serde_json::to_string(&value(&bytes)).unwrap();
        let read = serde_json::from_str::<SecretValue>(&json).unwrap();
        prop_assert_eq!(read.reveal(), &bytes[..]);
        let stored = postcard::to_stdvec(&value(&bytes)).unwrap();
        prop_assert!(stored.len() <= bytes.len() + 2);
        prop_assert_eq!(postcard::from_bytes::<SecretValue>(&stored).unwrap(), value(&bytes));
    }
}
