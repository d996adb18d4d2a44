//! Estimators of KL(policy ‖ reference) from a sampled token (Schulman, "Approximating KL divergence", 2020). What is said of
//! their bias holds where tokens are drawn from the policy's own distribution: temperature 1, nothing cut or added.

/// Of every token of an answer, with d = ln p(token | policy) − ln p(token | reference), both at temperature 1 over the whole
/// vocabulary. Not clamped.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kl {
    /// d: without bias, may be negative.
    pub k1: Vec<f32>,
    /// d² / 2: biased, of low variance.
    pub k2: Vec<f32>,
    /// exp(−d) − 1 + d: without bias, never negative.
    pub k3: Vec<f32>,
}

impl Kl {
    /// From a (policy, reference) pair of log-probabilities a token.
    pub(super) fn new(pairs: impl Iterator<Item = (f32, f32)>) -> Self {
        let mut kl = Kl::default();
        for (policy, reference) in pairs {
            let d = f64::from(policy) - f64::from(reference);
            kl.k1.push(d as f32);
            kl.k2.push((d * d / 2.0) as f32);
            // exp_m1 keeps what exp(−d) − 1 would lose near 0.
            kl.k3.push(((-d).exp_m1() + d) as f32);
        }
        kl
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_log_probs_give_zero_to_the_bit() {
        let kl = Kl::new([(-1.25, -1.25), (-0.0, 0.0), (-104.0, -104.0)].into_iter());
        for list in [kl.k1, kl.k2, kl.k3] {
            assert_eq!(list.iter().map(|v| v.to_bits() & 0x7fff_ffff).max(), Some(0));
        }
    }

    /// d = ln 2: k2 = ln²2 / 2, k3 = 1/2 − 1 + ln 2.
    #[test]
    fn known_values() {
        let kl = Kl::new([(std::f32::consts::LN_2, 0.0)].into_iter());
        let close = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-7, "{a} {b}");
        close(kl.k1[0], std::f64::consts::LN_2);
        close(kl.k2[0], 0.240_226_506_959);
        close(kl.k3[0], 0.193_147_180_559);
    }
}
