//! The holdfast binary: every role and every command.

fn main() {}
