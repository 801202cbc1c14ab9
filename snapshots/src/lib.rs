//! The snapshot format: what a member sends to another and what a backup is made of.
