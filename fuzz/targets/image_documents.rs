//! Manifests, indexes and configurations, as a registry sends them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| holdfast_node::image::fuzz_documents(bytes));
