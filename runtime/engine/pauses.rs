//! Who has the engine paused: threads may pause it at the same time, and one whose pause fails must not undo another's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Kept by the engine's thread.
#[derive(Default)]
pub(super) struct Pauses {
    /// One has succeeded, and was not ended since.
    in_force: bool,
    /// Those whose lanes are not all at rest yet, and whether they are still wanted.
    pending: BTreeMap<u64, Arc<AtomicBool>>,
}

impl Pauses {
    /// True if the engine is paused, or being paused.
    pub fn any(&self) -> bool {
        self.in_force || !self.pending.is_empty()
    }

    /// A pause begins. What it returns turns false when [`Pauses::end`] overtakes it: lanes that come to rest later go on then.
    pub fn begin(&mut self, pause: u64) -> Arc<AtomicBool> {
        let wanted = Arc::new(AtomicBool::new(true));
        self.pending.insert(pause, wanted.clone());
        wanted
    }

    /// All lanes have answered the pause.
    pub fn settle(&mut self, pause: u64, succeeded: bool) {
        // One that was ended before has nothing to put into force.
        if self.pending.remove(&pause).is_some() {
            self.in_force |= succeeded;
        }
    }

    /// Ends every pause.
    pub fn end(&mut self) {
        self.in_force = false;
        std::mem::take(&mut self.pending).values().for_each(|wanted| wanted.store(false, Ordering::SeqCst));
    }
}
