//! Changes a row of logits in place before a token is drawn from it: bias, penalties, banned tokens.
//!
//! In transformers' and vLLM's order, for the tokens that have an [`Edit`]: l' = penalise(l + bias) − subtract, where a
//! repetition penalty divides what is positive and multiplies what is not. Then every token without a bit in the row's
//! mask becomes −∞.

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// V.
    pub vocab: u32,
    /// The step's first request.
    pub first: u32,
}

super::kernel!("adjust_logits", Params, [("requests", Read), ("masks", Read), ("edits", Write), ("logits", Write)]);

/// What is done to one token's logit. Those of a row are in rising order of tokens, none twice.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Edit {
    /// The token, below V.
    pub token: u32,
    /// Added first; 0: none.
    pub bias: f32,
    /// The repetition penalty; 1: none.
    pub penalty: f32,
    /// Subtracted last; 0: none.
    pub subtract: f32,
    /// Written by the kernel: the logit as the model gave it.
    pub raw: f32,
}

impl Edit {
    /// The logit after the edit.
    fn apply(&self, logit: f32) -> f32 {
        let biased = logit + self.bias;
        let penalised = if biased > 0.0 { biased / self.penalty } else { biased * self.penalty };
        penalised - self.subtract
    }
}

/// The CPU twin for one row; `mask` has a bit a token.
pub fn adjust_logits(edits: &mut [Edit], mask: Option<&[u32]>, logits: &mut [f32]) {
    for edit in edits {
        let logit = &mut logits[edit.token as usize];
        edit.raw = *logit;
        *logit = edit.apply(*logit);
    }
    for (logits, word) in logits.chunks_mut(32).zip(mask.into_iter().flatten()) {
        match *word {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            word => {
                for (i, logit) in logits.iter_mut().enumerate() {
                    if word >> i & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// The logit of `token` as the model gave it.
pub fn raw_logit(edits: &[Edit], logits: &[f32], token: u32) -> f32 {
    match edits.binary_search_by_key(&token, |e| e.token) {
        Ok(i) => edits[i].raw,
        Err(_) => logits[token as usize],
    }
}
