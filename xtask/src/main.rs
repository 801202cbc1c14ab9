//! What the project runs on itself: demo, test, bench, ci.

fn main() {}
