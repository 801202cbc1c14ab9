//! What goes wrong with a volume's disk, one variant per step that failed.

use std::io;
use std::path::PathBuf;

use holdfast_model::VolumeId;

/// Why a volume's disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The folder of all of them.
    #[error("The folder of volumes '{}' could not be opened; check its path and permissions.", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Reading, writing or removing failed.
    #[error("The disk of {volume} could not be {action}; check the disk that holds the node's volumes.")]
    Disk {
        /// Which volume.
        volume: VolumeId,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A machine has it.
    #[error(
        "The disk of {volume} is attached to another microVM on this node; it is free when that one has ended."
    )]
    InUse {
        /// Which volume.
        volume: VolumeId,
    },
    /// A later attachment was seen.
    #[error(
        "The attachment {asked} of {volume} is over: this node has seen attachment {seen}, so the instance must not start."
    )]
    Fenced {
        /// Which volume.
        volume: VolumeId,
        /// The generation of the attachment that was asked for.
        asked: u64,
        /// The latest that was seen.
        seen: u64,
    },
    /// There should be a disk.
    #[error(
        "The disk of {volume} is not on this node, though it was in use before; look for the folder that held it, or restore it into a new volume."
    )]
    Missing {
        /// Which volume.
        volume: VolumeId,
    },
    /// What is there is not what was written.
    #[error(
        "The disk of {volume} is not as this node left it: {problem}. It is left alone; look into it by hand."
    )]
    Damaged {
        /// Which volume.
        volume: VolumeId,
        /// What is wrong.
        problem: &'static str,
    },
    /// No room for it.
    #[error("{volume} needs {needed_mib} MiB, and the node's disk for volumes has {free_mib} MiB free.")]
    Room {
        /// Which volume.
        volume: VolumeId,
        /// Its size.
        needed_mib: u64,
        /// What is free.
        free_mib: u64,
    },
    /// The tool is not there.
    #[error("mkfs.ext4 is not installed on this node; install e2fsprogs.")]
    ToolMissing,
    /// The tool failed.
    #[error("mkfs.ext4 could not make a file system on the disk of {volume}: {said}")]
    Tool {
        /// Which volume.
        volume: VolumeId,
        /// The end of what it said, or that it took too long.
        said: String,
    },
    /// Its machine would have had to stand for too long.
    #[error(
        "The disk of {volume} could not be cloned within {seconds} s, for which its microVM may stand: keep the node's volumes on a file system that clones files (XFS, Btrfs), or take the snapshot while nothing mounts the volume."
    )]
    Quiesce {
        /// Which volume.
        volume: VolumeId,
        /// How long it may stand.
        seconds: u64,
    },
    /// No device for it.
    #[error(
        "The disk of {volume} could not be made a loop device; the agent must be root, and the kernel must have loop devices."
    )]
    Device {
        /// Which volume.
        volume: VolumeId,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A thread died.
    #[error("A thread that worked on a volume ended unexpectedly; start the agent again.")]
    Thread,
}
