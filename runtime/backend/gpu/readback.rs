//! What comes back of blocks of outputs: in rounds that a bounded buffer holds, however many outputs steps have.

use std::ops::Range;

use bytemuck::pod_collect_to_vec;

use super::blocks::{Block, Class, TOKEN_TILE};
use super::record::Recorder;
use crate::error::{Error, Result};
use crate::kernels::log_sum_exp::RowStats;
use crate::kernels::sample::{self, Drawn};
use crate::kernels::top_k::{Candidate, MAX_K};

/// Bytes of the parts of a block of `rows` rows at most, with so many columns.
pub(super) fn most_bytes(rows: usize, columns: usize) -> u64 {
    (rows * (4 * columns + sample::MAX_KEPT_IDS * 4 + MAX_K * size_of::<Candidate>())) as u64
}

/// Where the parts of a block are in the buffer of its round.
#[derive(Clone, Default)]
pub(super) struct Place {
    pub best: Range<u64>,
    pub kept: Range<u64>,
    pub logits: Range<u64>,
    /// What is in the buffer must be read before this is written.
    begins_round: bool,
}

/// The parts of a block on the host.
pub(super) struct Answers {
    /// `k` a row.
    pub best: Vec<Candidate>,
    /// [`sample::MAX_KEPT_IDS`] a row, where the block reports them.
    pub kept: Vec<u32>,
    /// Of the tokens that a row asks for, or of all columns.
    pub logits: Vec<Vec<f32>>,
}

/// Steps on their way.
pub(super) struct Pending {
    pub blocks: Vec<Block>,
    pub requests: Vec<sample::Request>,
    places: Vec<Place>,
    buffer: Option<wgpu::Buffer>,
    answers: Vec<Answers>,
}

impl Pending {
    /// Places blocks in rounds of `most` bytes, which any block alone fits; `columns` says how many a block's logits have.
    pub(super) fn new(
        blocks: Vec<Block>,
        requests: Vec<sample::Request>,
        most: u64,
        columns: impl Fn(&Block) -> usize,
    ) -> Self {
        // Before them, in every round, what all outputs have.
        let begin = (requests.len() * (size_of::<RowStats>() + size_of::<Drawn>())) as u64;
        let mut at = begin;
        let mut places = Vec::new();
        for block in &blocks {
            let rows = block.len();
            let best = (rows * block.k * size_of::<Candidate>()) as u64;
            let kept = if block.reports { (rows * sample::MAX_KEPT_IDS * 4) as u64 } else { 0 };
            let logits = if block.class == Class::Columns { (rows * columns(block) * 4) as u64 } else { 0 };
            let bytes = best + kept + logits.next_multiple_of(8);
            let begins_round = at > begin && at + bytes > begin + most;
            if begins_round {
                at = begin;
            }
            let (kept_at, logits_at) = (at + best, at + best + kept);
            places.push(Place {
                best: at..kept_at,
                kept: kept_at..logits_at,
                logits: logits_at..logits_at + logits,
                begins_round,
            });
            at += bytes;
        }
        Pending { blocks, requests, places, buffer: None, answers: Vec::new() }
    }

    /// Bytes of the largest round.
    pub(super) fn bytes(&self) -> u64 {
        self.places.iter().map(|p| p.logits.end).max().unwrap_or(0).next_multiple_of(8)
    }

    /// What it is read back through: at least [`bytes`](Self::bytes).
    pub(super) fn use_buffer(&mut self, buffer: wgpu::Buffer) {
        self.buffer = Some(buffer);
    }

    pub(super) fn buffer(&self) -> Result<&wgpu::Buffer> {
        self.buffer.as_ref().ok_or_else(|| Error::internal("nothing to read back through"))
    }

    pub(super) fn place(&self, block: usize) -> Place {
        self.places[block].clone()
    }

    /// Makes room for a block that begins a round: runs what was recorded and reads what it left.
    pub(super) fn make_room(&mut self, recorder: &mut Recorder, block: usize) -> Result<()> {
        if !self.places[block].begins_round {
            return Ok(());
        }
        let bytes = recorder.read(self.buffer()?, self.places[block - 1].logits.end)?;
        self.take(&bytes, block)
    }

    /// Reads the answers of the blocks before `end` that are not read yet.
    pub(super) fn take(&mut self, bytes: &[u8], end: usize) -> Result<()> {
        for i in self.answers.len()..end {
            let (block, place) = (&self.blocks[i], &self.places[i]);
            let logits: Vec<f32> = pod_collect_to_vec(part(bytes, &place.logits)?);
            self.answers.push(Answers {
                best: pod_collect_to_vec(part(bytes, &place.best)?),
                kept: pod_collect_to_vec(part(bytes, &place.kept)?),
                logits: wanted(block, &logits),
            });
        }
        Ok(())
    }

    pub(super) fn answers(&self) -> &[Answers] {
        &self.answers
    }

    /// Statistics and draws of all outputs.
    pub(super) fn common(&self, bytes: &[u8]) -> Result<(Vec<RowStats>, Vec<Drawn>)> {
        let stats = (self.requests.len() * size_of::<RowStats>()) as u64;
        let drawn = stats + (self.requests.len() * size_of::<Drawn>()) as u64;
        Ok((pod_collect_to_vec(part(bytes, &(0..stats))?), pod_collect_to_vec(part(bytes, &(stats..drawn))?)))
    }
}

fn part<'a>(bytes: &'a [u8], range: &Range<u64>) -> Result<&'a [u8]> {
    bytes.get(range.start as usize..range.end as usize).ok_or_else(|| Error::internal("a short read-back"))
}

/// The logits that each row of a block wants.
fn wanted(block: &Block, logits: &[f32]) -> Vec<Vec<f32>> {
    let width = logits.len() / block.len().max(1);
    let rows = block.tokens.iter().zip(logits.chunks_exact(width.max(1)));
    let of = |(tokens, row): (&Option<std::sync::Arc<[u32]>>, &[f32])| {
        let Some(tokens) = tokens else { return row.to_vec() };
        let column = |token: &u32| {
            let (tile, place) = (token / TOKEN_TILE * TOKEN_TILE, token % TOKEN_TILE);
            match block.columns.binary_search(&tile) {
                Ok(i) => i * TOKEN_TILE as usize + place as usize,
                Err(_) => *token as usize,
            }
        };
        tokens.iter().map(|t| row[column(t)]).collect()
    };
    rows.map(of).collect()
}
