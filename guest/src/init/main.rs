//! `holdfast-init`: PID 1 of a microVM.
fn main() {}
