//! One lock per key, for as long as someone holds or waits for it: concurrent work on one digest happens once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// Locks by key. Its size is bounded by the number of callers at work.
pub(crate) struct KeyedLock<K> {
    locks: Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

impl<K: Hash + Eq + Clone> KeyedLock<K> {
    pub(crate) fn new() -> KeyedLock<K> {
        KeyedLock { locks: Mutex::new(HashMap::new()) }
    }

    /// Waits until nobody else holds this key.
    pub(crate) async fn lock(&self, key: K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(key).or_default())
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_is_held_once_and_forgotten() {
        let locks = KeyedLock::new();
        let first = locks.lock("a").await;
        let other = locks.lock("b").await;
        {
            let second = locks.lock("a");
            tokio::pin!(second);
            assert!(futures::poll!(second.as_mut()).is_pending());
            drop(first);
            let _second = second.await;
        }
        drop(other);
        let _third = locks.lock("c").await;
        assert_eq!(locks.locks.lock().unwrap().len(), 1);
    }
}
