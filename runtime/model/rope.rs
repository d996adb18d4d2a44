//! Rotary position frequencies, as transformers' `modeling_rope_utils` computes them (in f32, in the same order).

use std::f32::consts::PI;

/// How the frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    /// θ^(−2i/E).
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// ≥ 1.
        factor: f64,
    },
    /// NTK: the base grows with the sequence once it is longer than `max_positions`.
    Dynamic {
        /// ≥ 1.
        factor: f64,
        /// The trained length.
        max_positions: usize,
    },
    /// YaRN: interpolates slow frequencies, keeps fast ones, scales attention.
    Yarn {
        /// Context extension.
        factor: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated.
        beta_slow: f64,
        /// Round the correction range outwards to whole dimensions.
        truncate: bool,
        /// The trained length.
        original_max_positions: usize,
    },
    /// Llama 3.1: wavelengths above a bound are divided by `factor`, with a smooth passage.
    Llama3 {
        /// Context extension.
        factor: f64,
        /// original / low_freq_factor is the longest wavelength that is interpolated smoothly.
        low_freq_factor: f64,
        /// original / high_freq_factor is the longest wavelength that is kept.
        high_freq_factor: f64,
        /// The trained length.
        original_max_positions: usize,
    },
}

/// Rotary positions of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// θ.
    pub theta: f64,
    /// E: every dimension of a head is rotated.
    pub head_dim: usize,
    /// The stretching.
    pub kind: RopeKind,
}

impl Rope {
    /// The inverse frequencies [E/2] for a sequence of `sequence_len` tokens, and the factor on cos and sin.
    pub fn frequencies(&self, sequence_len: usize) -> (Vec<f32>, f32) {
        let dim = self.head_dim;
        match &self.kind {
            RopeKind::Default => (inverse(self.theta as f32, dim), 1.0),
            RopeKind::Linear { factor } => {
                (inverse(self.theta as f32, dim).iter().map(|f| f / *factor as f32).collect(), 1.0)
            }
            RopeKind::Dynamic { factor, max_positions } => {
                let trained = *max_positions as f64;
                let len = (sequence_len.max(*max_positions)) as f64;
                let growth = (factor * len / trained) - (factor - 1.0);
                let base = self.theta * growth.powf(dim as f64 / (dim as f64 - 2.0));
                (inverse(base as f32, dim), 1.0)
            }
            RopeKind::Yarn { .. } => self.yarn(),
            RopeKind::Llama3 { .. } => (self.llama3(), 1.0),
        }
    }

    /// True if the frequencies depend on the length of the sequence, for lengths above `trained`.
    pub fn length_dependent_above(&self) -> Option<usize> {
        match self.kind {
            RopeKind::Dynamic { max_positions, .. } => Some(max_positions),
            _ => None,
        }
    }

    fn yarn(&self) -> (Vec<f32>, f32) {
        let RopeKind::Yarn { factor, attention_factor, beta_fast, beta_slow, truncate, original_max_positions } =
            self.kind
        else {
            return (Vec::new(), 1.0);
        };
        let dim = self.head_dim as f64;
        // The dimension that makes `rotations` turns over the trained length.
        let dimension_of = |rotations: f64| {
            dim * (original_max_positions as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let frequencies = (0..self.head_dim / 2).map(|i| {
            let position = (self.theta as f32).powf(2.0 * i as f32 / dim as f32);
            let (kept, interpolated) = (1.0 / position, 1.0 / (factor as f32 * position));
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            interpolated * (1.0 - keep) + kept * keep
        });
        (frequencies.collect(), attention_factor as f32)
    }

    fn llama3(&self) -> Vec<f32> {
        let RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } = self.kind else {
            return Vec::new();
        };
        let trained = original_max_positions as f64;
        let (longest_kept, longest_smooth) = (trained / high_freq_factor, trained / low_freq_factor);
        let factor = factor as f32;
        let scale = |frequency: &f32| {
            let wavelength = 2.0 * PI / frequency;
            if wavelength > longest_smooth as f32 {
                frequency / factor
            } else if wavelength < longest_kept as f32 {
                *frequency
            } else {
                let smooth = (trained as f32 / wavelength - low_freq_factor as f32)
                    / (high_freq_factor - low_freq_factor) as f32;
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        };
        inverse(self.theta as f32, self.head_dim).iter().map(scale).collect()
    }
}

/// θ^(−2i/dim) for i in 0..dim/2.
fn inverse(theta: f32, dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f32 / dim as f32)).collect()
}
