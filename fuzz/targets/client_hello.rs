//! The edge's reader of a ClientHello, fed in pieces: every outcome but a panic is allowed.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| holdfast_edge::client_hello::fuzz_client_hello(bytes));
