//! The rollouts of a runtime that are under way: each takes threads, so there are only so many places.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::job::Shared;
use crate::error::{Error, ErrorKind, Result};

/// Rollouts that a runtime's models may have under way at a time, as the policy.
pub const MAX_ROLLOUTS: usize = 64;

/// Those under way.
#[derive(Clone, Default)]
pub(crate) struct Rollouts {
    list: Arc<Mutex<List>>,
}

#[derive(Default)]
struct List {
    rollouts: BTreeMap<u64, Arc<Shared>>,
    next: u64,
}

/// One of them; dropping it makes room.
pub(super) struct Place {
    rollouts: Rollouts,
    number: u64,
}

impl Rollouts {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// `Full` if there is no place.
    pub(super) fn enter(&self, rollout: &Arc<Shared>) -> Result<Place> {
        let mut list = self.lock();
        let others = list.rollouts.len();
        if others >= MAX_ROLLOUTS {
            let text =
                format!("{others} rollouts are under way, at most {MAX_ROLLOUTS} may be: retry when one has ended");
            return Err(Error::new(ErrorKind::Full, text));
        }
        let number = list.next;
        list.next += 1;
        list.rollouts.insert(number, rollout.clone());
        Ok(Place { rollouts: self.clone(), number })
    }

    /// Cancels all of them, also those that have no job in the engine at the moment.
    pub fn cancel(&self) {
        let all: Vec<Arc<Shared>> = self.lock().rollouts.values().cloned().collect();
        all.iter().for_each(|rollout| rollout.cancel());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.rollouts.lock().rollouts.remove(&self.number);
    }
}
