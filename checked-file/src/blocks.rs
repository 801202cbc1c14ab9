//! The checksums of blocks, by their number. No I/O.

use crate::BLOCK_BYTES;

/// A block of which nothing is known. No block has this checksum.
const UNKNOWN: u64 = 0;

/// What is known of each block.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    sums: Vec<u64>,
}

/// How blocks that were read compare with what is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// All are known and as they were.
    Same,
    /// Some are not known; the others are as they were.
    SomeUnknown,
    /// This one is not as it was.
    Differs(u64),
}

/// The number covers a block's place too, so that a disk that returns another block's bytes is noticed.
fn sum(number: u64, block: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(block).update(&number.to_le_bytes());
    let mut first = [0_u8; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first).max(UNKNOWN + 1)
}

impl Blocks {
    pub(crate) fn of(sums: Vec<u64>) -> Self {
        Blocks { sums }
    }

    pub(crate) fn sums(&self) -> &[u64] {
        &self.sums
    }

    fn known(&self, block: u64) -> u64 {
        self.sums.get(block as usize).copied().unwrap_or(UNKNOWN)
    }

    /// Compares the blocks from one on.
    pub(crate) fn compare(&self, from: u64, bytes: &[u8]) -> Compared {
        let mut compared = Compared::Same;
        for (block, bytes) in (from..).zip(bytes.chunks(BLOCK_BYTES as usize)) {
            match self.known(block) {
                UNKNOWN => compared = Compared::SomeUnknown,
                known if known != sum(block, bytes) => return Compared::Differs(block),
                _ => {}
            }
        }
        compared
    }

    /// Notes the blocks from one on, as far as they are not known.
    pub(crate) fn learn(&mut self, from: u64, bytes: &[u8]) {
        for (block, bytes) in (from..).zip(bytes.chunks(BLOCK_BYTES as usize)) {
            if self.known(block) == UNKNOWN {
                let at = block as usize;
                if self.sums.len() <= at {
                    self.sums.resize(at + 1, UNKNOWN);
                }
                self.sums[at] = sum(block, bytes);
            }
        }
    }

    /// Knows nothing of these blocks any more.
    pub(crate) fn forget(&mut self, from: u64, end: u64) {
        let count = self.sums.len();
        let range = (from as usize).min(count)..(end as usize).min(count);
        self.sums[range].fill(UNKNOWN);
    }

    /// There are no more blocks than this.
    pub(crate) fn cut(&mut self, count: u64) {
        self.sums.truncate(count as usize);
    }
}
