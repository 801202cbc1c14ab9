//! `holdfast.toml`: whatever is accepted has a digest, and means the same when it is parsed again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(manifest) = holdfast_model::manifest::parse(text) {
        let again = holdfast_model::manifest::parse(text);
        assert_eq!(Ok(&manifest), again.as_ref());
        assert!(manifest.digest().is_ok());
    }
});
