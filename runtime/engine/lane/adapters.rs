//! Which adapters the executor has, and who uses them.
//!
//! A content is on the device as long as somebody has it: a handle, a request on its way, a sequence. The lane itself only
//! watches; where it finds that nobody is left it frees the slot. So a slot that a row names always has the content that
//! the row's sequence began with.

use std::sync::{Arc, Weak};

use super::Lane;
use crate::engine::NewAdapter;
use crate::engine::sequence::{Adapted, AdapterContent};
use crate::error::{Error, Result};

/// The slots.
#[derive(Default)]
pub(super) struct Adapters {
    slots: Vec<Option<Slot>>,
}

struct Slot {
    id: u64,
    content: Weak<AdapterContent>,
}

impl Adapters {
    /// Contents on the device.
    pub fn count(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// A new sequence's adapter.
    pub fn find(&self, content: Option<&Arc<AdapterContent>>) -> Result<Option<Adapted>> {
        let Some(content) = content else { return Ok(None) };
        let slot = self.slots.iter().position(|slot| slot.as_ref().is_some_and(|s| s.id == content.id));
        let slot = slot.ok_or_else(|| Error::internal("an adapter that is not on the device"))?;
        // Checked when it was added.
        Ok(Some(Adapted { content: content.clone(), slot: slot as u32 }))
    }
}

impl Lane {
    /// Brings a content to the device.
    pub fn add_adapter(&mut self, adapter: NewAdapter) -> Result<()> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.free_adapters();
        let NewAdapter { content, weights, room } = adapter;
        let slots = &mut self.adapters.slots;
        let slot = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        let number = u32::try_from(slot).map_err(|_| Error::limit("too many adapters"))?;
        self.executor.add_adapter(number, weights, room)?;
        slots.resize_with(slots.len().max(slot + 1), || None);
        slots[slot] = Some(Slot { id: content.id, content: Arc::downgrade(&content) });
        self.note_adapters();
        Ok(())
    }

    /// Frees the slots of contents that nobody has any more.
    pub fn free_adapters(&mut self) {
        let before = self.adapters.count();
        for (number, slot) in (0..).zip(&mut self.adapters.slots) {
            if let Some(gone) = slot.take_if(|s| s.content.strong_count() == 0) {
                self.executor.remove_adapter(number);
                self.kv.forget_adapter(gone.id);
            }
        }
        if self.adapters.count() < before {
            self.note_adapters();
        }
    }

    fn note_adapters(&mut self) {
        self.stats.adapters = self.adapters.count();
        self.stats.adapter_bytes = self.executor.memory().adapters;
        self.publish();
    }
}
