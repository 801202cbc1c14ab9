//! The frames of an exec session, which a member reads from a person and from a node, and both of them from it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    holdfast_model::exec::decode_untrusted(bytes);
});
