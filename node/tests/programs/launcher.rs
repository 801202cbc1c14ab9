//! Puts VMMs into their jails for agents that run inside tests, whose own binary is a test's.

fn main() {
    holdfast_jail::launcher::enter_if_asked();
}
