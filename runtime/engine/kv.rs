//! The paged KV cache's book-keeping: which block holds what, who uses it, what may be reused, what goes first.
//!
//! Every block in use or kept is a node of a tree: its content is its [`Key`]s after those of its parent, from a root
//! that stands for the weights that computed it. A sequence is a path. Whole blocks are shared by reference; of a block
//! that fits in part the fitting places are copied (copy on write: only a block's owner appends to it). Blocks that
//! nobody uses stay until the space is needed, least recently used first, children before parents.
//!
//! Within a step, what one sequence packs another may follow at once (a layer's keys are all written before any are
//! read). What a sequence is about to compute is *planned*, so that others wait for it instead of computing it again.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use crate::backend::BlockCopy;
use crate::kernels::KV_BLOCK;

/// What the key and value of a position depend on, besides all before it: the token, and under a rope that depends on
/// the length beyond the trained one, the forward's length (else 0).
pub(super) type Key = (u32, u32);

/// What computed the keys and values of a tree, besides tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Root {
    /// Which weights: rises with every change.
    pub generation: u64,
    /// The id of an adapter's content, which no other content ever has; 0: none.
    pub adapter: u64,
}

/// A sequence's way through the tree.
#[derive(Default)]
pub(super) struct Path {
    pub blocks: Vec<u32>,
    /// Positions whose keys and values are in the cache, or will be once the step that is being packed has run.
    pub computed: usize,
    /// It has computed nothing itself since it started: it still takes what others have.
    owns: bool,
    root: u64,
}

/// What to do after following.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Follow {
    /// Compute the next position.
    Compute,
    /// Another sequence is computing it: wait a step.
    Wait,
    /// There is no block for a copy.
    Full,
}

struct Node {
    uid: u64,
    parent: u64,
    depth: u32,
    keys: [Key; KV_BLOCK],
    /// Keys that are known: the owner is computing them.
    planned: usize,
    /// Keys whose rows are packed.
    filled: usize,
    /// Keys whose rows have run.
    stable: usize,
    /// The step in which the owner last packed rows.
    planned_in: u64,
}

#[derive(Default)]
struct Block {
    users: u32,
    last_used: u64,
    node: Option<Node>,
}

pub(super) struct KvCache {
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// Blocks that nobody uses, in the order in which they go.
    idle: BTreeSet<(u64, Reverse<u32>, u32)>,
    /// By uid of the parent.
    children: HashMap<u64, Vec<u32>>,
    /// The uid of each root.
    roots: HashMap<Root, u64>,
    next_uid: u64,
    step: u64,
    /// Blocks whose `stable` lags behind `filled`.
    touched: Vec<u32>,
    copies: Vec<BlockCopy>,
    /// Contents that had to make room.
    pub evictions: u64,
    /// Blocks copied because a sequence wanted to go on from the middle of one.
    pub copied: u64,
}

impl KvCache {
    pub fn new(total: usize) -> Self {
        KvCache {
            blocks: (0..total).map(|_| Block::default()).collect(),
            // Lowest numbers first, so that a small load touches little memory. Slots are checked to fit 32 bits.
            free: (0..total).rev().map(|b| b as u32).collect(),
            idle: BTreeSet::new(),
            children: HashMap::new(),
            roots: HashMap::new(),
            next_uid: 0,
            step: 1,
            touched: Vec::new(),
            copies: Vec::new(),
            evictions: 0,
            copied: 0,
        }
    }

    pub fn needed(positions: usize) -> usize {
        positions.div_ceil(KV_BLOCK)
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be had: free, or kept without a user.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that are kept without a user.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    fn uid(&mut self) -> u64 {
        self.next_uid += 1;
        self.next_uid
    }

    /// A path that begins where nothing is computed, under this root.
    pub fn path(&mut self, root: Root) -> Path {
        let root = match self.roots.get(&root) {
            Some(uid) => *uid,
            None => {
                let uid = self.uid();
                self.roots.insert(root, uid);
                uid
            }
        };
        Path { root, ..Path::default() }
    }

    /// Forgets the roots of an adapter that is gone. Nobody finds what hangs under them any more; it goes when its space is
    /// needed.
    pub fn forget_adapter(&mut self, adapter: u64) {
        self.roots.retain(|root, _| root.adapter != adapter);
    }

    fn node(&mut self, block: u32) -> Option<&mut Node> {
        self.blocks[block as usize].node.as_mut()
    }

    /// The uid and depth under which the next block of a path hangs.
    fn tip(&self, path: &Path, index: usize) -> (u64, u32) {
        let last = index.checked_sub(1).and_then(|i| self.blocks[path.blocks[i] as usize].node.as_ref());
        last.map_or((path.root, 0), |node| (node.uid, node.depth + 1))
    }

    /// A block with one user and no content, under the given parent.
    fn take(&mut self, (parent, depth): (u64, u32)) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, _, block) = self.idle.pop_first()?;
                self.evictions += 1;
                self.forget(block);
                block
            }
        };
        let uid = self.uid();
        let keys = [(0, 0); KV_BLOCK];
        let node = Node { uid, parent, depth, keys, planned: 0, filled: 0, stable: 0, planned_in: 0 };
        self.blocks[block as usize] = Block { users: 1, last_used: self.step, node: Some(node) };
        self.children.entry(parent).or_default().push(block);
        Some(block)
    }

    /// Takes a block out of the tree.
    fn forget(&mut self, block: u32) {
        if let Some(node) = self.blocks[block as usize].node.take() {
            if let Some(siblings) = self.children.get_mut(&node.parent) {
                siblings.retain(|b| *b != block);
                if siblings.is_empty() {
                    self.children.remove(&node.parent);
                }
            }
            self.children.remove(&node.uid);
        }
    }

    fn use_block(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        if state.users == 0 {
            let depth = state.node.as_ref().map_or(0, |n| n.depth);
            self.idle.remove(&(state.last_used, Reverse(depth), block));
        }
        state.users += 1;
    }

    fn leave_block(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        state.users -= 1;
        if state.users > 0 {
            return;
        }
        state.last_used = self.step;
        match &mut state.node {
            Some(node) if node.filled > 0 => {
                // Nobody is computing the rest any more.
                node.planned = node.filled;
                self.idle.insert((self.step, Reverse(node.depth), block));
            }
            _ => {
                self.forget(block);
                self.free.push(block);
            }
        }
    }

    /// Gives up a path's blocks; what is in them stays until the space is needed.
    pub fn release(&mut self, path: &mut Path) {
        for block in std::mem::take(&mut path.blocks) {
            self.leave_block(block);
        }
        *path = Path { root: path.root, ..Path::default() };
    }

    /// The child under `parent` that begins with exactly these keys.
    fn whole_child(&self, parent: u64, keys: &[Key; KV_BLOCK]) -> Option<u32> {
        let children = self.children.get(&parent)?;
        let fits = |b: &&u32| {
            let node = self.blocks[**b as usize].node.as_ref();
            node.is_some_and(|n| n.filled == KV_BLOCK && n.keys == *keys)
        };
        children.iter().find(fits).copied()
    }

    /// How many blocks of a new sequence are there, and how many of them nobody uses.
    pub fn probe(&self, root: Root, key: impl Fn(usize) -> Key, limit: usize) -> (usize, usize) {
        let Some(mut parent) = self.roots.get(&root).copied() else { return (0, 0) };
        let (mut matched, mut unused) = (0, 0);
        while (matched + 1) * KV_BLOCK <= limit {
            let keys = std::array::from_fn(|i| key(matched * KV_BLOCK + i));
            let Some(block) = self.whole_child(parent, &keys) else { break };
            let state = &self.blocks[block as usize];
            unused += usize::from(state.users == 0);
            parent = state.node.as_ref().map_or(0, |n| n.uid);
            matched += 1;
        }
        (matched, unused)
    }

    /// Takes over what the cache has of a sequence that has computed nothing itself, up to `limit` positions.
    pub fn follow(&mut self, path: &mut Path, key: impl Fn(usize) -> Key, limit: usize) -> Follow {
        while !path.owns && path.computed < limit {
            let (parent, depth) = self.tip(path, path.blocks.len());
            let fit = KV_BLOCK.min(limit - path.computed);
            let mut keys = [(u32::MAX, u32::MAX); KV_BLOCK];
            for (i, k) in keys[..fit].iter_mut().enumerate() {
                *k = key(path.computed + i);
            }
            if fit == KV_BLOCK
                && let Some(block) = self.whole_child(parent, &keys)
            {
                self.use_block(block);
                path.blocks.push(block);
                path.computed += KV_BLOCK;
                continue;
            }
            // The longest beginning that has run, and the longest that is on its way.
            let (mut best, mut source, mut coming) = (0, None, 0);
            for &block in self.children.get(&parent).into_iter().flatten() {
                let Some(node) = &self.blocks[block as usize].node else { continue };
                let on_its_way = if node.planned_in + 1 >= self.step { node.planned } else { node.filled };
                let common = keys[..fit].iter().zip(&node.keys[..on_its_way]).take_while(|(a, b)| a == b).count();
                coming = coming.max(common);
                if common.min(node.stable) > best {
                    (best, source) = (common.min(node.stable), Some(block));
                }
            }
            if coming > best {
                return Follow::Wait;
            }
            let Some(source) = source else { break };
            // The source must not be the block that makes room for its own copy.
            self.use_block(source);
            let Some(copy) = self.take((parent, depth)) else {
                self.leave_block(source);
                return Follow::Full;
            };
            self.copy(source, copy, best);
            path.blocks.push(copy);
            path.computed += best;
            path.owns = true;
        }
        Follow::Compute
    }

    /// Notes a copy; `from`, which has one user more than it needs, keeps it until the copies are taken.
    fn copy(&mut self, from: u32, to: u32, places: usize) {
        let keys = self.node(from).map_or([(0, 0); KV_BLOCK], |n| n.keys);
        if let Some(node) = self.node(to) {
            node.keys = keys;
            (node.planned, node.filled, node.stable) = (places, places, places);
        }
        self.copied += 1;
        self.copies.push(BlockCopy { from, to });
    }

    /// The copies to make before the next step, in order.
    pub fn take_copies(&mut self) -> Vec<BlockCopy> {
        let copies = std::mem::take(&mut self.copies);
        copies.iter().for_each(|c| self.leave_block(c.from));
        copies
    }

    /// A second path with the same content, for sequences that part here; `None` if there is no block for its end.
    pub fn fork(&mut self, path: &Path) -> Option<Path> {
        let whole = path.computed / KV_BLOCK;
        let mut fork = Path { blocks: path.blocks[..whole].to_vec(), computed: path.computed, owns: true, ..*path };
        fork.blocks.iter().for_each(|b| self.use_block(*b));
        let places = path.computed % KV_BLOCK;
        if places > 0 {
            let source = path.blocks[whole];
            self.use_block(source);
            let Some(copy) = self.take(self.tip(path, whole)) else {
                self.leave_block(source);
                self.release(&mut fork);
                return None;
            };
            self.copy(source, copy, places);
            fork.blocks.push(copy);
        }
        Some(fork)
    }

    /// Makes sure there is a block for `position`; false if none can be had.
    pub fn reserve(&mut self, path: &mut Path, position: usize) -> bool {
        while path.blocks.len() <= position / KV_BLOCK {
            let Some(block) = self.take(self.tip(path, path.blocks.len())) else { return false };
            path.blocks.push(block);
        }
        true
    }

    /// Notes that the row of `position`, for which there is a block, is in the step that is being packed.
    pub fn pack(&mut self, path: &mut Path, position: usize, key: Key) {
        let (block, place) = (path.blocks[position / KV_BLOCK], position % KV_BLOCK);
        let step = self.step;
        if let Some(node) = self.node(block) {
            node.keys[place] = key;
            node.filled = place + 1;
            node.planned = node.planned.max(node.filled);
            node.planned_in = step;
        }
        self.touched.push(block);
        path.computed = position + 1;
        path.owns = true;
    }

    /// Says what the owner of `path` will compute next, as far as the block at hand goes.
    pub fn plan(&mut self, path: &mut Path, known: usize, key: impl Fn(usize) -> Key) {
        if !self.reserve(path, path.computed) {
            return;
        }
        let (block, step) = (path.blocks[path.computed / KV_BLOCK], self.step);
        let start = path.computed - path.computed % KV_BLOCK;
        if let Some(node) = self.node(block) {
            node.planned = KV_BLOCK.min(known - start);
            for place in node.filled..node.planned {
                node.keys[place] = key(start + place);
            }
            node.planned_in = step;
        }
    }

    /// What was packed has run.
    pub fn end_step(&mut self) {
        for block in std::mem::take(&mut self.touched) {
            if let Some(node) = self.node(block) {
                node.stable = node.filled;
            }
        }
        self.step += 1;
    }

    /// Forgets everything: after a step that failed nobody knows what is in the blocks. All paths must be gone.
    /// Counts evictions and copies from here.
    pub fn reset_counts(&mut self) {
        (self.evictions, self.copied) = (0, 0);
    }

    pub fn clear(&mut self) {
        let (evictions, copied) = (self.evictions, self.copied);
        *self = KvCache { evictions, copied, ..KvCache::new(self.blocks.len()) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(tokens: &[u32]) -> impl Fn(usize) -> Key + '_ {
        |p| (tokens[p], 0)
    }

    /// Computes what is missing of `tokens`, as the scheduler does.
    fn compute(kv: &mut KvCache, path: &mut Path, tokens: &[u32], limit: usize) -> usize {
        assert_eq!(kv.follow(path, key(tokens), limit), Follow::Compute);
        let from = path.computed;
        for p in from..tokens.len() {
            assert!(kv.reserve(path, p));
            kv.pack(path, p, key(tokens)(p));
        }
        kv.take_copies();
        kv.end_step();
        tokens.len() - from
    }

    #[test]
    fn prefixes_are_shared_to_the_token() {
        let mut kv = KvCache::new(16);
        let tokens: Vec<u32> = (0..40).collect();
        let mut a = kv.path(Root::default());
        assert_eq!(compute(&mut kv, &mut a, &tokens, 39), 40);
        // The same again: all but the last position.
        let mut b = kv.path(Root::default());
        assert_eq!(compute(&mut kv, &mut b, &tokens, 39), 1);
        assert_eq!(a.blocks[..2], b.blocks[..2]);
        assert_ne!(a.blocks[2], b.blocks[2], "a partly filled block has one owner");
        // Another end; other weights.
        let mut other = tokens.clone();
        other[35] = 99;
        let mut c = kv.path(Root::default());
        assert_eq!(compute(&mut kv, &mut c, &other, 39), 5);
        let mut d = kv.path(Root { generation: 1, ..Root::default() });
        assert_eq!(compute(&mut kv, &mut d, &tokens, 39), 40);
        kv.release(&mut d);
        // An adapter, and the same adapter after it was replaced.
        for adapter in [7, 8] {
            let mut d = kv.path(Root { adapter, ..Root::default() });
            assert_eq!(compute(&mut kv, &mut d, &tokens, 39), 40);
            kv.release(&mut d);
            kv.forget_adapter(adapter);
        }
        for path in [&mut a, &mut b, &mut c, &mut d] {
            kv.release(path);
        }
        assert_eq!(kv.available(), 16);
        let mut e = kv.path(Root::default());
        assert_eq!(compute(&mut kv, &mut e, &tokens, 39), 1, "kept without a user");
    }

    #[test]
    fn what_is_on_its_way_is_waited_for() {
        let mut kv = KvCache::new(16);
        let tokens: Vec<u32> = (0..40).collect();
        let (mut a, mut b) = (kv.path(Root::default()), kv.path(Root::default()));
        assert_eq!(kv.follow(&mut a, key(&tokens), 39), Follow::Compute);
        for p in 0..16 {
            assert!(kv.reserve(&mut a, p));
            kv.pack(&mut a, p, (tokens[p], 0));
        }
        kv.plan(&mut a, 40, key(&tokens));
        // b takes the block that is in this very step, and waits for the next one.
        assert_eq!((kv.follow(&mut b, key(&tokens), 39), b.computed), (Follow::Wait, 16));
        kv.end_step();
        assert_eq!(kv.follow(&mut b, key(&tokens), 39), Follow::Wait);
        kv.end_step();
        // a has not moved for a whole step.
        assert_eq!((kv.follow(&mut b, key(&tokens), 39), b.computed), (Follow::Compute, 16));
    }

    #[test]
    fn forks_copy_their_end_and_least_recent_goes_first() {
        let mut kv = KvCache::new(6);
        let tokens: Vec<u32> = (0..20).collect();
        let mut a = kv.path(Root::default());
        compute(&mut kv, &mut a, &tokens, 19);
        let mut b = kv.fork(&a).unwrap();
        assert_eq!((b.computed, b.blocks[0]), (20, a.blocks[0]));
        assert_eq!(kv.take_copies(), [BlockCopy { from: a.blocks[1], to: b.blocks[1] }]);
        kv.release(&mut a);
        kv.end_step();
        kv.release(&mut b);
        assert_eq!((kv.available(), kv.idle()), (6, 3));
        // Four blocks of something else: three free ones and a's end, the one used least recently.
        let other: Vec<u32> = (100..164).collect();
        let mut c = kv.path(Root::default());
        compute(&mut kv, &mut c, &other, 63);
        assert_eq!((kv.evictions, kv.idle()), (1, 2));
        let mut d = kv.path(Root::default());
        assert_eq!(compute(&mut kv, &mut d, &tokens[..17], 16), 1, "the first block is still there");
        assert!(!kv.reserve(&mut d, 48), "no more than there is");
        kv.release(&mut c);
        kv.release(&mut d);
        kv.clear();
        assert_eq!(kv.available(), 6);
    }
}
