//! The state machine: decide and evolve over redb tables, digests, rebuild.
