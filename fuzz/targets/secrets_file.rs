//! The file of secrets: what a person imports, and what a member sealed for a node (I14).
#![no_main]

use holdfast_model::secrets::Bundle;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(bundle) = Bundle::from_file(bytes) {
        assert_eq!(&*bundle.to_file(), bytes, "a bundle has one file");
    }
    if let Ok(bundle) = Bundle::import(bytes) {
        let file = bundle.to_file();
        assert!(Bundle::from_file(&file).is_ok_and(|again| again == bundle));
    }
});
