//! The replicated log: openraft over mTLS and redb, membership, linearizable reads.
