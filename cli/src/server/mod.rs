//! `holdfast server`: a control-plane member, from its making to its end.
//!
//! A member's folder holds `member.json` (names and addresses), `credential.pem` (its own key and certificate),
//! `authority.pem` (the cluster's CA, with which every member signs), and what `raft` keeps there. `member.json` is
//! written last: a folder without it is half-made and is refused.

mod folder;
mod init;
mod join;
pub(crate) mod offline;
mod registries;
mod run;

pub(crate) use init::init;
pub(crate) use join::join;
pub(crate) use run::run;
