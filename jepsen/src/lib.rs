//! Partition tests of the real processes.
