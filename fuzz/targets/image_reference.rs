//! Image references: what is accepted is written back as it was read.
#![no_main]

use holdfast_node::image::ImageRef;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<ImageRef>() {
        let shown = reference.to_string();
        assert_eq!(shown.parse::<ImageRef>().as_ref(), Ok(&reference));
    }
});
