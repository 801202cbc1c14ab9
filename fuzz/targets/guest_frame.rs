//! The frames between a node agent and a guest, either of which may be hostile to the other.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    holdfast_guest::frame::decode_untrusted(bytes);
});
