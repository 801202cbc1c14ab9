//! Partition tests of the real processes, which are not built yet.
//!
//! What kills real processes today is in `tests/` (`i02_kill_all_50_times`, `i04_retries_across_leaders`,
//! `i05_whole_outage`, `replace_a_member`); what partitions, tears disks and bends clocks is in `sim/`. Nemeses over
//! network namespaces, recorded histories and their checkers come here. Nothing depends on this crate.
