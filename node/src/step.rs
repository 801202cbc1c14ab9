//! The points between two changes of the host or of the agent's disk.
//!
//! Everything that lasts longer than the agent's process is made and removed in steps, and each one is told when it has
//! been done. The product's listener does nothing. A test's ends the process there, at every step in turn, and looks at what
//! the next agent makes of it: so a new step cannot be left out of that test, which asks for all of [`Step::ALL`].

use std::fmt;
use std::sync::Arc;

/// Hears of each step right after it was done.
pub type AfterStep = Arc<dyn Fn(Step) + Send + Sync>;

/// A listener that does nothing.
pub fn unheard() -> AfterStep {
    Arc::new(|_| {})
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// What has just been done.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            /// Every step.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name, for tests and their messages.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

steps! {
    /// What is begun, or has happened, is durable in the node's state.
    Stored = "stored";
    /// Something of a blob was received and written; it is not known yet whether it is the blob's.
    BlobWritten = "blob written";
    /// A blob was digested, synced, and given its name.
    BlobStored = "blob stored";
    /// An image's layers are unpacked, in a folder of work under way.
    LayersUnpacked = "layers unpacked";
    /// The root file system was made there.
    RootBuilt = "root built";
    /// The root was synced and given its name.
    RootStored = "root stored";
    /// A blob that nothing needs is removed.
    BlobCollected = "blob collected";
    /// A root that nothing needs lost its name; its files are still there.
    RootHidden = "root hidden";
    /// They are removed.
    RootCollected = "root collected";
    /// The instance's root image is in the cache.
    RootReady = "root ready";
    /// What guests may send is bounded.
    Guarded = "guarded";
    /// The TAP exists.
    TapMade = "tap made";
    /// The kernel's settings for it are written.
    TapSet = "tap set";
    /// It is up, with its address and the route to the guest.
    TapUp = "tap up";
    /// Every volume is locked and has a device.
    VolumesAttached = "volumes attached";
    /// The machine's folder is there, with nothing of a former machine in it.
    FolderMade = "folder made";
    /// A user id is claimed.
    IdClaimed = "id claimed";
    /// The cgroup is there with its limits.
    GroupMade = "group made";
    /// The files for what the VMM says are there.
    OutputMade = "output made";
    /// The launcher's process waits behind its walls for the word to become the VMM.
    Launched = "launched";
    /// The process is recorded in the machine's folder.
    Recorded = "recorded";
    /// The VMM was executed.
    Executed = "executed";
    /// The VMM says that its guest runs.
    VmmAnswers = "vmm answers";
    /// The workload was asked to stop, and has stopped or is late.
    WorkloadStopped = "workload stopped";
    /// The VMM was killed and is gone.
    Killed = "killed";
    /// The TAP is down until the next start.
    TapDown = "tap down";
    /// Every TAP of a node that was cut off is down.
    Isolated = "isolated";
    /// The TAP is removed.
    TapRemoved = "tap removed";
    /// The cgroup is removed.
    GroupRemoved = "group removed";
    /// Something in the machine's folder is removed, not all of it.
    EntryRemoved = "entry removed";
    /// The machine's folder is removed.
    FolderRemoved = "folder removed";
}

impl Step {
    /// Those of images that are fetched, built and collected.
    pub const OF_IMAGES: &'static [Self] = &[
        Self::BlobWritten,
        Self::BlobStored,
        Self::LayersUnpacked,
        Self::RootBuilt,
        Self::RootStored,
        Self::BlobCollected,
        Self::RootHidden,
        Self::RootCollected,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
