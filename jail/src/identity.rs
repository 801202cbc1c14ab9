//! A user and a group of its own and no capability, for good: not in the bounding set, not ambient, not by a set-user-id
//! file, not by becoming user 0 again.

use std::io;

use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::error::{Failure, InStep, Step};
use crate::plan::Identity;

/// User 0 means nothing, and neither that nor the ban on ambient capabilities can be undone.
const SECURE_BITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

/// More capabilities than any kernel has.
const CAPABILITIES_MAX: libc::c_ulong = 64;

/// Gives up what the launcher has of root.
pub(crate) fn drop_root(identity: Option<Identity>, no_capabilities: bool) -> Result<(), Failure> {
    if no_capabilities {
        empty_bounding_set()?;
        rustix::thread::set_capabilities_secure_bits(SECURE_BITS)
            .in_step(Step::Identity, "setting the secure bits")?;
    }
    if let Some(Identity { uid, gid }) = identity {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        // The launcher has one thread: what is said of the thread is said of the process.
        rustix::thread::set_thread_groups(&[]).in_step(Step::Identity, "leaving groups")?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).in_step(Step::Identity, "changing the group")?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).in_step(Step::Identity, "changing the user")?;
    }
    if no_capabilities {
        rustix::thread::clear_ambient_capability_set()
            .in_step(Step::Identity, "clearing ambient capabilities")?;
        let none = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, none).in_step(Step::Identity, "dropping capabilities")?;
    }
    rustix::thread::set_no_new_privs(true).in_step(Step::Identity, "giving up new privileges")
}

fn empty_bounding_set() -> Result<(), Failure> {
    for capability in 0..CAPABILITIES_MAX {
        // SAFETY: takes a number by value and changes this process only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            // The first number beyond the kernel's last capability.
            if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 {
                return Ok(());
            }
            return Err(error).in_step(Step::Identity, format_args!("dropping capability {capability}"));
        }
    }
    Ok(())
}
