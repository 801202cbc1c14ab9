//! seccomp: what a VMM may ask of the kernel, compiled by `seccompiler` and installed before the VMM's first
//! instruction.
//!
//! Three filters, of which the kernel takes the strictest answer. The first kills, or refuses, whoever asks for what
//! only an attacker asks for. The second refuses `clone3`, whose flags no filter can see, so that the C library falls
//! back to `clone`. The third lets through what the VMM needs, and refuses the rest. There is no way around them: the
//! one program that may still be executed is the VMM itself, by the descriptor that the launcher holds, and that
//! closes with it.

mod lists;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::error::{Failure, InStep, Step};
use crate::plan::{Attack, Filter, Profile};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Every namespace flag of `clone`.
const NEW_NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUSER;

/// What makes a clone a thread.
const THREAD: i32 = libc::CLONE_VM | libc::CLONE_THREAD;

/// The filters, in the order in which they are installed. `program` is the descriptor of the VMM's program.
pub(crate) fn compile(filter: &Filter, program: BorrowedFd<'_>) -> Result<Vec<BpfProgram>, Failure> {
    let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let absent = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let attack = match filter.attack {
        Attack::Kill => SeccompAction::KillProcess,
        Attack::Refuse => denied.clone(),
    };
    let mut attacks = unconditional(lists::ATTACKS);
    // Whoever holds a volume could give its device up and be found holding the next machine's.
    let commands = lists::LOOP_COMMANDS.iter();
    let commands = commands.map(|command| rule(vec![condition(1, SeccompCmpOp::Eq, *command)?]));
    attacks.insert(libc::SYS_ioctl, commands.collect::<Result<_, _>>()?);
    let mut filters = vec![
        build(attacks, SeccompAction::Allow, attack)?,
        build(unconditional(&[libc::SYS_clone3]), SeccompAction::Allow, absent)?,
    ];
    if filter.profile == Profile::Qemu {
        filters.push(build(qemu(program)?, denied, SeccompAction::Allow)?);
    }
    Ok(filters)
}

/// Installs the filters; from here on there is no way back.
pub(crate) fn install(filters: &[BpfProgram]) -> Result<(), Failure> {
    filters
        .iter()
        .try_for_each(|filter| seccompiler::apply_filter(filter).in_step(Step::Filter, "installing a filter"))
}

fn build(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, Failure> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)
        .in_step(Step::Filter, "finding a filter for this architecture")?;
    let filter = SeccompFilter::new(rules, otherwise, matched, architecture)
        .in_step(Step::Filter, "making a filter")?;
    BpfProgram::try_from(filter).in_step(Step::Filter, "compiling a filter")
}

fn unconditional(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

fn qemu(program: BorrowedFd<'_>) -> Result<Rules, Failure> {
    let mut rules = unconditional(lists::QEMU);
    let family = |family: i32| rule(vec![condition(0, SeccompCmpOp::Eq, family)?]);
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.insert(call, vec![family(libc::AF_UNIX)?]);
    }
    // Threads, and no namespace: what a process would need to leave its own.
    let mask = u64::from((THREAD | NEW_NAMESPACES).cast_unsigned());
    let threads = condition(0, SeccompCmpOp::MaskedEq(mask), THREAD)?;
    rules.insert(libc::SYS_clone, vec![rule(vec![threads])?]);
    // Of two refusals the kernel takes the later filter's: this one must leave the answer to the one before.
    rules.insert(libc::SYS_clone3, Vec::new());
    // Reading limits, never setting them.
    let reads = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
        .in_step(Step::Filter, "making a condition")?;
    rules.insert(libc::SYS_prlimit64, vec![rule(vec![reads])?]);
    let itself = condition(0, SeccompCmpOp::Eq, program.as_raw_fd())?;
    let by_descriptor = condition(4, SeccompCmpOp::Eq, libc::AT_EMPTY_PATH)?;
    rules.insert(libc::SYS_execveat, vec![rule(vec![itself, by_descriptor])?]);
    let mut names = Vec::new();
    for option in lists::QEMU_PRCTL {
        names.push(rule(vec![condition(0, SeccompCmpOp::Eq, *option)?])?);
    }
    rules.insert(libc::SYS_prctl, names);
    Ok(rules)
}

fn condition(argument: u8, compare: SeccompCmpOp, value: i32) -> Result<SeccompCondition, Failure> {
    let value = u64::from(value.cast_unsigned());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)
        .in_step(Step::Filter, "making a condition")
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, Failure> {
    SeccompRule::new(conditions).in_step(Step::Filter, "making a rule")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_lists_compile_and_contradict_nowhere() {
        let null = std::fs::File::open("/dev/null").unwrap();
        for profile in [Profile::Qemu, Profile::Firecracker] {
            for attack in [Attack::Kill, Attack::Refuse] {
                let filters = compile(&Filter { profile, attack }, null.as_fd()).unwrap();
                assert_eq!(filters.len(), if profile == Profile::Qemu { 3 } else { 2 });
                assert!(filters.iter().all(|filter| !filter.is_empty()));
            }
        }
        let needed = qemu(null.as_fd()).unwrap();
        let both: Vec<_> = lists::ATTACKS.iter().filter(|call| needed.contains_key(call)).collect();
        assert!(both.is_empty(), "needed, and killed for: {both:?}");
    }
}
