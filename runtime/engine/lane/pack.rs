//! What goes into a step: rows of running sequences, oldest first, with the outputs they ask for.

use std::cmp::Reverse;

use super::Lane;
use crate::backend::{NO_ADAPTER, OutputRow, Want};
use crate::engine::kv::{Follow, KvCache};
use crate::engine::sequence::{Finish, Role, Sequence};
use crate::engine::stats::Rows;
use crate::error::Error;
use crate::kernels::embed::FROM_DRAW;
use crate::kernels::{KV_BLOCK, RowMeta};

/// A step being packed, and where its outputs go.
#[derive(Default)]
pub(super) struct Packed {
    pub rows: Vec<RowMeta>,
    pub tables: Vec<u32>,
    pub cos_sin: Vec<f32>,
    pub outputs: Vec<OutputRow>,
    /// Of every row.
    pub adapters: Vec<u32>,
    pub owners: Vec<Owner>,
    /// Rows by kind, the steps ahead included.
    pub kinds: Rows,
    /// Steps that follow with the tokens that are drawn in the one before, and with the same tables.
    pub ahead: Vec<Packed>,
}

/// Whose an output is.
#[derive(Clone, Copy)]
pub(super) struct Owner {
    /// In `Lane::running`.
    pub sequence: usize,
    pub position: usize,
    /// Which of the siblings that begin at this position; 0: the sequence itself.
    pub sibling: u32,
}

impl Lane {
    /// Fills a step: first a row for each sequence that decodes, with its guesses, then chunks of the others.
    pub(super) fn pack(&mut self) -> Packed {
        let mut packed = Packed::default();
        let mut order: Vec<usize> = (0..self.running.len()).collect();
        order.sort_by_key(|&i| (Reverse(self.running[i].job.options.scheduling.priority), self.running[i].seniority));
        self.running.iter_mut().for_each(|s| s.packed = false);
        let decodes = |s: &Sequence| s.path.computed > 0 && s.needed() == s.path.computed + 1;
        // Within a priority: a decoding sequence may take blocks before a prefill does, never before a more urgent one.
        let mut turns = order.clone();
        turns.sort_by_key(|&i| (Reverse(self.running[i].job.options.scheduling.priority), !decodes(&self.running[i])));
        let total = turns.len();
        let ahead = self.steps_ahead();
        packed.ahead.resize_with(ahead, Packed::default);
        for (turn, i) in turns.into_iter().enumerate() {
            // Siblings have outputs without rows; a step has as many outputs as rows at most.
            let room = self.max_rows - packed.rows.len().max(packed.outputs.len());
            if room == 0 {
                break;
            }
            // Guesses only take what rows of others leave.
            let guesses = if decodes(&self.running[i]) { room.saturating_sub(total - turn) } else { 0 };
            if let Err(error) = self.pack_sequence(i, room, guesses, &order, &mut packed) {
                self.running[i].job.fail(error);
            }
        }
        packed.ahead.retain(|step| !step.rows.is_empty());
        packed
    }

    /// How many steps may follow the next one before anybody looks at what was drawn: none unless all sequences decode and
    /// their draws can be prepared now.
    fn steps_ahead(&self) -> usize {
        let foreseen = |s: &Sequence| match &s.role {
            Role::Sample { sampler, siblings: 0 } => {
                let decodes = s.path.computed > 0 && s.needed() == s.path.computed + 1;
                decodes && sampler.foresees() && self.executor.feeds(&sampler.plan.request, sampler.plan.top)
            }
            _ => false,
        };
        if self.running.is_empty() || !self.running.iter().all(foreseen) {
            return 0;
        }
        // Whoever waits takes the place of who ends, and should not wait for long.
        let waits = self.jobs.values().any(|job| !job.waiting.is_empty());
        let most = if waits { self.steps_at_once.div_ceil(2) } else { self.steps_at_once };
        let ahead = most.min(self.max_rows / self.running.len()).saturating_sub(1);
        // Nobody loses blocks, or waits for one, for what may not be needed.
        let more = |s: &Sequence| KvCache::needed(s.needed() + ahead).saturating_sub(s.path.blocks.len());
        let blocks: usize = self.running.iter().map(more).sum();
        if blocks <= self.kv.available() { ahead } else { 0 }
    }

    /// Packs rows of the steps ahead for a sequence whose row in the first one is packed and has the last output there; how
    /// many.
    fn pack_ahead(&mut self, i: usize, table: usize, packed: &mut Packed) -> u64 {
        let needed = self.running[i].needed();
        let mut rows = 0;
        let mut previous = packed.outputs.len() - 1;
        for n in 0..packed.ahead.len() {
            let sequence = &mut self.running[i];
            let position = needed + n;
            let Role::Sample { sampler, .. } = &mut sequence.role else { break };
            if n >= sampler.remaining() || !self.kv.reserve(&mut sequence.path, position) {
                break;
            }
            let Some(sampling) = sampler.foresee(position + 1, n + 1) else { break };
            sampler.ahead = n + 1;
            let step = &mut packed.ahead[n];
            let row = step.rows.len() as u32;
            let token = FROM_DRAW | previous as u32;
            previous = step.outputs.len();
            step.outputs.push(OutputRow { row, want: Want::Sample(Box::new(sampling)) });
            step.owners.push(Owner { sequence: i, position, sibling: 0 });
            self.push_row(i, position, token, table, step);
            rows += 1;
        }
        rows
    }

    /// Takes blocks away from the youngest sequence after `i` in `order` that has no rows in this step.
    fn make_room(&mut self, i: usize, order: &[usize]) -> bool {
        let younger = order.iter().rev().take_while(|&&j| j != i);
        for &j in younger {
            let victim = &mut self.running[j];
            if !victim.packed && !victim.preempted && !victim.path.blocks.is_empty() {
                victim.preempted = true;
                self.kv.release(&mut victim.path);
                return true;
            }
        }
        false
    }

    fn pack_sequence(
        &mut self,
        i: usize,
        room: usize,
        guesses: usize,
        order: &[usize],
        packed: &mut Packed,
    ) -> Result<(), Error> {
        if self.running[i].preempted || self.running[i].job.has_failed() {
            return Ok(());
        }
        // 1. What others have computed.
        loop {
            let limit = self.running[i].cacheable();
            let Sequence { tokens, path, job, .. } = &mut self.running[i];
            let before = path.computed;
            let follow = self.kv.follow(path, |p| tokens.key(p), limit);
            let found = (path.computed - before) as u64;
            if found > 0 {
                job.count(|stats| stats.rows.cached += found);
                self.stats.rows.cached += found;
            }
            match follow {
                Follow::Compute => break,
                Follow::Wait => return Ok(()),
                Follow::Full if self.make_room(i, order) => {}
                // No room beside the block it would be copied from: that block itself makes room, and its rows are
                // computed again.
                Follow::Full => break,
            }
        }
        // A step's tables are bounded; what does not fit goes into the next one.
        let sequence = &self.running[i];
        let tables = KvCache::needed(sequence.needed() + guesses.min(KV_BLOCK).max(packed.ahead.len()))
            .max(sequence.path.blocks.len());
        if packed.tables.len() + tables > self.max_table_entries && !packed.tables.is_empty() {
            return Ok(());
        }
        // 2. Blocks for its own rows, as far as there are any.
        let start = self.running[i].path.computed;
        let wanted = (self.running[i].needed() - start).min(room);
        let mut count = 0;
        while count < wanted {
            if self.kv.reserve(&mut self.running[i].path, start + count) {
                count += 1;
            } else if !self.make_room(i, order) {
                break;
            }
        }
        if count == 0 {
            return Ok(());
        }
        // 3. What the last row draws from, and guesses beyond it, before anything is noted: either may fail.
        let sequence = &mut self.running[i];
        let needed = sequence.needed();
        let (mut draws, mut drafts) = (Vec::new(), Vec::new());
        if let Role::Sample { sampler, siblings } = &mut sequence.role
            && start + count == needed
        {
            let most = u32::try_from(room - count).unwrap_or(u32::MAX);
            match sampler.draws(needed, 1 + (*siblings).min(most))? {
                Some(found) => draws = found,
                None => {
                    self.end(i, Finish::Blocked);
                    return Ok(());
                }
            }
            if *siblings == 0 && sampler.plan.speculate > 0 {
                drafts = sampler.guess(&sequence.tokens.ids, guesses)?;
                let room = (0..drafts.len()).take_while(|n| self.kv.reserve(&mut sequence.path, needed + n)).count();
                drafts.truncate(room);
                sampler.keep_guesses(room);
            }
        }
        // Siblings for whom this step has no output draw from a row of their own later.
        let root = self.root(&self.running[i]);
        let sequence = &mut self.running[i];
        if !draws.is_empty() && sequence.results() > draws.len() {
            let path = self.kv.path(root);
            let later = sequence.split(draws.len() as u32, path);
            if let Some(job) = self.jobs.get_mut(&sequence.job_number) {
                later.into_iter().for_each(|s| job.waiting.push_front(s));
            }
        }
        // 4. The rows.
        let table = packed.tables.len();
        let mut kinds = Rows::default();
        for position in start..start + count {
            let sequence = &mut self.running[i];
            if let Some(want) = sequence.read_at(position) {
                packed.outputs.push(OutputRow { row: packed.rows.len() as u32, want });
                packed.owners.push(Owner { sequence: i, position, sibling: 0 });
            }
            kinds.add(match position {
                p if p < sequence.seen => Rows { recomputed: 1, ..Rows::default() },
                p if p < sequence.prompt_len() => Rows { prefill: 1, ..Rows::default() },
                _ => Rows { decode: 1, ..Rows::default() },
            });
            let (token, key) = (sequence.tokens.ids[position], sequence.tokens.key(position));
            self.kv.pack(&mut sequence.path, position, key);
            self.push_row(i, position, token, table, packed);
        }
        let sequence = &mut self.running[i];
        sequence.seen = sequence.seen.max(start + count);
        let last_row = (packed.rows.len() - 1) as u32;
        // Siblings first: they begin from what the sequence is before it takes its own token.
        for (sibling, sampling) in draws.into_iter().enumerate().rev() {
            packed.outputs.push(OutputRow { row: last_row, want: Want::Sample(Box::new(sampling)) });
            packed.owners.push(Owner { sequence: i, position: needed - 1, sibling: sibling as u32 });
        }
        for (n, (token, sampling)) in drafts.into_iter().enumerate() {
            kinds.drafted += 1;
            packed.outputs.push(OutputRow { row: packed.rows.len() as u32, want: Want::Sample(Box::new(sampling)) });
            packed.owners.push(Owner { sequence: i, position: needed + n, sibling: 0 });
            self.push_row(i, needed + n, token, table, packed);
        }
        if !packed.ahead.is_empty() {
            kinds.decode += self.pack_ahead(i, table, packed);
        }
        // 5. What it will compute next, so that others wait for it.
        let sequence = &mut self.running[i];
        if sequence.path.computed < sequence.needed() {
            let (tokens, known) = (&sequence.tokens, sequence.needed());
            self.kv.plan(&mut sequence.path, known, |p| tokens.key(p));
        }
        packed.tables.extend_from_slice(&sequence.path.blocks);
        sequence.packed = true;
        sequence.job.count(|stats| stats.rows.add(kinds));
        packed.kinds.add(kinds);
        Ok(())
    }

    fn push_row(&mut self, i: usize, position: usize, token: u32, table: usize, packed: &mut Packed) {
        let sequence = &self.running[i];
        let block = sequence.path.blocks[position / KV_BLOCK] as usize;
        // Rows, positions and slots are below 2^32: rows by max_rows, slots by the KV cache's size check.
        packed.rows.push(RowMeta {
            token,
            position: position as u32,
            slot: (block * KV_BLOCK + position % KV_BLOCK) as u32,
            table: table as u32,
        });
        packed.adapters.push(sequence.adapter.as_ref().map_or(NO_ADAPTER, |a| a.slot));
        self.angles.push(position, sequence.tokens.forward_len(position), &mut packed.cos_sin);
    }
}
