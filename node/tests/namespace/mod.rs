//! Runs a test in network, process and mount namespaces of its own: what it makes and starts ends with it, however it
//! ends, and it disturbs nobody.

use std::process::{Command, Stdio};

/// Set in the namespaces.
const INSIDE: &str = "HOLDFAST_TEST_NAMESPACE";

/// Whether this process is inside. If not, runs the test of this name again inside, and panics if that one fails.
pub(crate) fn inside(test: &str) -> bool {
    inside_with(test, &[])
}

/// The same, with more arguments for the test's program.
pub(crate) fn inside_with(test: &str, more: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", "ip link set dev lo up && exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .args(more)
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .status()
        .expect("'unshare' of util-linux must be installed, and the tests run as root");
    assert!(status.success(), "the test failed in its namespace, see above");
    false
}

/// Runs a program inside.
#[allow(dead_code, reason = "shared between tests")]
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("the program must be installed");
    assert!(status.success(), "{program} {arguments:?}: {status}");
}
