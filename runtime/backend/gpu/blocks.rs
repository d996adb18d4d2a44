//! The outputs of steps, cut into blocks that the head computes together, with what they ask for.

use std::collections::HashMap;
use std::sync::Arc;

use crate::backend::{OutputRow, Sampling, Want};
use crate::kernels::adjust_logits::Edit;
use crate::kernels::sample;
use crate::kernels::top_k::NO_TOKEN;

/// Columns of the product from which a single token's logit is taken: whole tiles of every shape.
pub(super) const TOKEN_TILE: u32 = 64;

/// Edits of logits in an upload at most; a row has at most V.
pub(super) fn most_edits(vocab: usize) -> usize {
    vocab.max(1 << 16)
}

/// What an output needs of the head; they are computed in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Needs the logits themselves.
    Logits,
    /// Needs what the pass over the vocabulary leaves of them.
    Stats,
    /// Single tokens, or a score head.
    Columns,
}

fn class(want: &Want) -> Class {
    match want {
        Want::Sample(_) => Class::Logits,
        Want::Logprob { top, .. } if *top > 0 => Class::Logits,
        Want::Logprob { .. } => Class::Stats,
        Want::Tokens(_) | Want::Score => Class::Columns,
    }
}

/// Indices of the outputs, in the order in which they are computed; `own_head` names an output's own score head, if it has
/// one.
pub(super) fn order(outputs: &[OutputRow], own_head: impl Fn(usize) -> Option<u32>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..outputs.len()).collect();
    order.sort_by_key(|&i| (class(&outputs[i].want), own_head(i)));
    order
}

/// Some outputs of a step that are computed together.
pub(super) struct Block {
    pub step: usize,
    /// Places in the step's order.
    pub start: usize,
    pub end: usize,
    /// The place of `start` in the tables of all steps.
    pub first: u32,
    pub class: Class,
    /// Alternatives to find.
    pub k: usize,
    pub samples: bool,
    pub changes: bool,
    pub reports: bool,
    /// The score head of an adapter, by its slot; `None`: the model's.
    pub own_head: Option<u32>,
    /// First columns of the tiles that single tokens are in; empty: all columns.
    pub columns: Vec<u32>,
    /// Of single tokens: which ones each row wants; `None`: all columns.
    pub tokens: Vec<Option<Arc<[u32]>>>,
    /// Edits and masks to upload before it.
    pub upload: Option<(Vec<Edit>, Vec<u32>)>,
}

impl Block {
    pub fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Blocks in the making.
pub(super) struct Blocks {
    /// Rows of a block, and of the masks, at most.
    rows: usize,
    /// Columns of the head.
    width: usize,
    vocab: usize,
    pub blocks: Vec<Block>,
    /// Of all outputs in their order: the targets of log-probs, and what draws ask for.
    pub targets: Vec<u32>,
    pub requests: Vec<sample::Request>,
    /// The block that uploads what later ones add to it, and the rows of its masks.
    uploading: Option<usize>,
    mask_rows: HashMap<*const u32, u32>,
}

impl Blocks {
    pub fn new([rows, width, vocab]: [usize; 3]) -> Self {
        Blocks {
            rows,
            width,
            vocab,
            blocks: Vec::new(),
            targets: Vec::new(),
            requests: Vec::new(),
            uploading: None,
            mask_rows: HashMap::new(),
        }
    }

    /// Adds the outputs of a step, which are in their order.
    pub fn add_step(&mut self, step: usize, wants: &[&Want], own_heads: &[Option<u32>]) {
        let mut start = 0;
        while start < wants.len() {
            let class = class(wants[start]);
            let own_head = own_heads[start];
            let same = |(w, own): &(&&Want, &Option<u32>)| self::class(w) == class && **own == own_head;
            let mut end = start + wants[start..].iter().zip(&own_heads[start..]).take_while(same).count();
            end = end.min(start + self.rows);
            let mut columns = Vec::new();
            if class == Class::Columns {
                // Tiles of single tokens as long as they are fewer than the vocabulary has.
                let most = self.width.div_ceil(TOKEN_TILE as usize);
                let of = |want: &&Want| match want {
                    Want::Tokens(tokens) => tokens.iter().map(|t| t / TOKEN_TILE * TOKEN_TILE).collect(),
                    _ => Vec::new(),
                };
                columns = wants[start..end].iter().flat_map(of).collect();
                columns.sort_unstable();
                columns.dedup();
                if columns.len() >= most {
                    columns.clear();
                }
            } else {
                // As many rows as their edits have room for; one row always has.
                let mut edits = 0;
                let fits = |want: &&&Want| {
                    edits += if let Want::Sample(sampling) = **want { sampling.edits.len() } else { 0 };
                    edits <= most_edits(self.vocab)
                };
                end = end.min(start + wants[start..end].iter().take_while(fits).count().max(1));
            }
            self.add_block(step, start, class, columns, &wants[start..end]);
            if let Some(block) = self.blocks.last_mut() {
                block.own_head = own_head;
            }
            start = end;
        }
    }

    fn add_block(&mut self, step: usize, start: usize, class: Class, columns: Vec<u32>, wants: &[&Want]) {
        let tokens = |want: &&Want| if let Want::Tokens(tokens) = want { Some(tokens.clone()) } else { None };
        // Below max_rows.
        let first = self.requests.len() as u32;
        let mut block = Block {
            step,
            start,
            end: start + wants.len(),
            first,
            class,
            k: wants.iter().map(|w| w.top()).max().unwrap_or(0),
            samples: false,
            changes: false,
            reports: false,
            own_head: None,
            columns,
            tokens: wants.iter().map(tokens).collect(),
            upload: None,
        };
        let words = self.vocab.div_ceil(32);
        let (mut edits, mut masks) = (0, 0);
        for want in wants {
            if let Want::Sample(sampling) = want {
                edits += sampling.edits.len();
                masks += usize::from(sampling.mask.is_some());
            }
        }
        // Blocks share an upload while there is room.
        let fits = self
            .uploading
            .and_then(|i| self.blocks[i].upload.as_ref())
            .is_some_and(|(e, m)| e.len() + edits <= most_edits(self.vocab) && m.len() / words + masks <= self.rows);
        if edits + masks > 0 && !fits {
            block.upload = Some((Vec::new(), Vec::new()));
            self.uploading = Some(self.blocks.len());
            self.mask_rows.clear();
        }
        block.changes = edits + masks > 0;
        self.blocks.push(block);
        for want in wants {
            self.targets.push(if let Want::Logprob { target, .. } = want { *target } else { NO_TOKEN });
            let mut request = sample::Request { active: 0, ..sample::Request::default() };
            if let Want::Sample(sampling) = want {
                request = self.request(sampling, words);
                if let Some(block) = self.blocks.last_mut() {
                    block.samples = true;
                    block.reports |= request.kept_ids > 0;
                }
            }
            self.requests.push(request);
        }
    }

    /// A draw's request, its edits and mask added to the upload.
    fn request(&mut self, sampling: &Sampling, words: usize) -> sample::Request {
        let mut request = sampling.request;
        let upload = self.uploading.and_then(|i| self.blocks[i].upload.as_mut());
        let Some((edits, masks)) = upload else { return request };
        // Both are bounded by the buffers' sizes, which are below 2^32.
        request.first_edit = edits.len() as u32;
        request.edit_count = sampling.edits.len() as u32;
        edits.extend_from_slice(&sampling.edits);
        if let Some(mask) = &sampling.mask {
            let row = *self.mask_rows.entry(Arc::as_ptr(mask).cast()).or_insert_with(|| {
                masks.extend_from_slice(mask);
                (masks.len() / words - 1) as u32
            });
            request.mask_row = row;
        }
        request
    }
}
