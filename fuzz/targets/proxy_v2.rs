//! The decoder of PROXY v2 headers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| holdfast_edge::proxy_protocol::fuzz_proxy_header(bytes));
