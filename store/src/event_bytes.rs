//! How events become bytes, and how each is chained to the one before it (I12).
//!
//! An event's bytes are a form byte and its postcard form, which ends in the 32 bytes of `chain`. Those are
//! `BLAKE3-derive("holdfast 2026 event chain v1", previous chain ‖ bytes before the chain)`.

use crate::error::StoreError;
use crate::tables::{FORM, form};
use blake3::hazmat::{ContextKey, HasherExt, hash_derive_key_context};
use holdfast_model::{Digest, Event};
use std::sync::LazyLock;

const CHAIN_BYTES: usize = 32;
const TABLE: &str = "event";

/// The key that the chain's context stands for. Made once: that costs as much as half a link.
static CHAIN_KEY: LazyLock<ContextKey> =
    LazyLock::new(|| hash_derive_key_context("holdfast 2026 event chain v1"));

fn link(previous: Digest, body: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new_from_context_key(&CHAIN_KEY);
    hasher.update(&previous.0);
    hasher.update(body);
    Digest(*hasher.finalize().as_bytes())
}

/// Chains `event`, whose `chain` holds the previous event's, and returns its bytes.
pub(crate) fn seal(event: &mut Event) -> Result<Vec<u8>, StoreError> {
    let mut bytes =
        postcard::to_extend(event, form()).map_err(|source| StoreError::Encode { table: TABLE, source })?;
    let split = bytes.len() - CHAIN_BYTES;
    event.chain = link(event.chain, &bytes[..split]);
    bytes[split..].copy_from_slice(&event.chain.0);
    Ok(bytes)
}

/// The event of these bytes.
pub(crate) fn open(bytes: &[u8]) -> Result<Event, StoreError> {
    match bytes.split_first() {
        Some((&FORM, rest)) => {
            postcard::from_bytes(rest).map_err(|source| StoreError::Decode { table: TABLE, source })
        }
        Some((&version, _)) => Err(StoreError::UnknownForm { table: TABLE, version }),
        None => Err(StoreError::corrupt("an event is empty")),
    }
}

/// The end of the chain with the event of these bytes, if they continue the chain that ends in `previous`.
pub(crate) fn continued(previous: Digest, bytes: &[u8]) -> Option<Digest> {
    let (body, chain) = bytes.split_last_chunk::<CHAIN_BYTES>()?;
    let linked = link(previous, body);
    (linked.0 == *chain).then_some(linked)
}
