//! Landlock: a second wall behind the root. Even a VMM that saw the host's files could open none but its own; it
//! neither connects nor listens over TCP, signals nobody else, and meets no abstract socket of the host's.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::error::{Failure, InStep, Step};
use crate::plan::Access;
use crate::report::Enforced;

/// What this release asks for; an older kernel does what it knows of it, and the agent is told.
const ABI_WANTED: ABI = ABI::V6;

/// Asks for the version instead of making a rule set.
const ASK_VERSION: u32 = 1;

/// The version of Landlock that this kernel has; 0 is none.
pub fn landlock_version() -> u32 {
    // SAFETY: with this flag the call takes no structure and makes nothing.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            ASK_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}

/// Restricts this process for good.
pub(crate) fn restrict(access: &Access) -> Result<Enforced, Failure> {
    let status = try_restrict(access)?;
    Ok(match status {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partly,
        RulesetStatus::NotEnforced => Enforced::Not,
    })
}

fn try_restrict(access: &Access) -> Result<RulesetStatus, Failure> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_WANTED))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(ABI_WANTED)))
        .and_then(|rules| rules.scope(Scope::from_all(ABI_WANTED)))
        .and_then(Ruleset::create)
        .in_step(Step::Access, "making a rule set")?;
    let read = BitFlags::from(AccessFs::ReadFile);
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    // A socket is bound and connected to without being opened.
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
    let groups = [
        (&access.read, read),
        (&access.execute, read | AccessFs::Execute),
        (&access.devices, device),
        (&access.sockets, sockets),
    ];
    for (paths, allowed) in groups {
        for path in paths {
            rules = add(rules, path, allowed)?;
        }
    }
    let restricted = rules.restrict_self().in_step(Step::Access, "restricting the process")?;
    Ok(restricted.ruleset)
}

fn add(
    rules: RulesetCreated,
    path: &std::path::Path,
    allowed: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Failure> {
    let what = format_args!("allowing '{}'", path.display());
    let opened = PathFd::new(path).in_step(Step::Access, what)?;
    rules.add_rule(PathBeneath::new(opened, allowed)).in_step(Step::Access, what)
}
