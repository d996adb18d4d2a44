//! Which KV blocks are free. A sequence gets all the blocks it can ever need when it starts, so that it never waits
//! half-done and two sequences never wait for each other.

use crate::kernels::KV_BLOCK;

pub(super) struct KvBlocks {
    free: Vec<u32>,
}

impl KvBlocks {
    pub(super) fn new(total: usize) -> Self {
        // Lowest numbers first, so that a small load touches little memory.
        KvBlocks { free: (0..u32::try_from(total).unwrap_or(u32::MAX)).rev().collect() }
    }

    pub(super) fn needed(positions: usize) -> usize {
        positions.div_ceil(KV_BLOCK)
    }

    /// Blocks for `positions` positions; `None` if there are not enough free ones now.
    pub(super) fn take(&mut self, positions: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(Self::needed(positions))?;
        let mut blocks = self.free.split_off(rest);
        blocks.reverse();
        Some(blocks)
    }

    pub(super) fn give_back(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks.into_iter().rev());
    }
}
