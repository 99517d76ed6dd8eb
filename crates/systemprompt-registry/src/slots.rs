//! One at a time for each key. Of a key that nobody works on, only what was left for the next is kept.

use std::{
    collections::HashMap,
    hash::Hash,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::OwnedMutexGuard;

pub(crate) struct Slots<K, T>(Arc<Mutex<Map<K, T>>>);

type Map<K, T> = HashMap<K, Slot<T>>;
type Slot<T> = Arc<tokio::sync::Mutex<Option<T>>>;

/// What nobody else can touch. Left empty, its place is given up.
pub(crate) struct Held<K: Eq + Hash, T> {
    slots: Arc<Mutex<Map<K, T>>>,
    key: K,
    slot: Slot<T>,
    /// None while it is waited for.
    guard: Option<OwnedMutexGuard<Option<T>>>,
}

impl<K, T> Default for Slots<K, T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash + Copy, T> Slots<K, T> {
    /// Waits for whoever works on the key now, if anybody does.
    pub(crate) async fn lock(&self, key: K) -> Held<K, T> {
        let mut held = self.place(key);
        held.guard = Some(held.slot.clone().lock_owned().await);
        held
    }

    /// None while somebody works on the key.
    pub(crate) fn try_lock(&self, key: K) -> Option<Held<K, T>> {
        let mut held = self.place(key);
        held.guard = held.slot.clone().try_lock_owned().ok();
        held.guard.is_some().then_some(held)
    }

    /// Drops what was left for keys that nobody works on.
    pub(crate) fn forget_idle(&self) {
        entries(&self.0).retain(|_, slot| Arc::strong_count(slot) > 1);
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        entries(&self.0).len()
    }

    fn place(&self, key: K) -> Held<K, T> {
        let slot = entries(&self.0).entry(key).or_default().clone();
        Held { slots: self.0.clone(), key, slot, guard: None }
    }
}

fn entries<K, T>(slots: &Mutex<Map<K, T>>) -> MutexGuard<'_, Map<K, T>> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Eq + Hash, T> Deref for Held<K, T> {
    type Target = Option<T>;
    fn deref(&self) -> &Option<T> {
        self.guard.as_deref().expect("handed out only when it is locked")
    }
}

impl<K: Eq + Hash, T> DerefMut for Held<K, T> {
    fn deref_mut(&mut self) -> &mut Option<T> {
        self.guard.as_deref_mut().expect("handed out only when it is locked")
    }
}

impl<K: Eq + Hash, T> Drop for Held<K, T> {
    fn drop(&mut self) {
        let mut entries = entries(&self.slots);
        self.guard = None;
        // The map's and ours: nobody waits, and under the map's lock nobody begins to.
        let nobody_else = Arc::strong_count(&self.slot) == 2;
        if nobody_else && self.slot.try_lock().is_ok_and(|left| left.is_none()) {
            entries.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{pin::pin, task::Poll};

    #[tokio::test]
    async fn a_place_is_kept_for_those_who_wait_and_for_what_was_left() {
        let slots = Slots::<u8, &str>::default();
        let held = slots.lock(1).await;
        assert!(slots.try_lock(1).is_none());
        {
            let mut waiting = pin!(slots.lock(1));
            assert!(matches!(futures_util::poll!(&mut waiting), Poll::Pending));
            drop(held);
            let mut next = waiting.await;
            *next = Some("left");
        }
        assert_eq!(slots.len(), 1);
        let mut held = slots.lock(1).await;
        assert_eq!(*held, Some("left"));
        *held = None;
        {
            let mut gives_up = pin!(slots.lock(1));
            assert!(matches!(futures_util::poll!(&mut gives_up), Poll::Pending));
            drop(held);
            assert_eq!(slots.len(), 1, "somebody waits");
        }
        assert_eq!(slots.len(), 0);
        drop(slots.lock(2).await);
        assert_eq!(slots.len(), 0);
    }
}
