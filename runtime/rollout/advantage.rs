//! What a reward is worth among the others.

/// Added to a standard deviation before it divides, as in TRL.
const EPSILON: f64 = 1e-4;

/// How rewards r become advantages A. Sequences whose reward is NaN take no part and get 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Advantage {
    /// GRPO as in TRL: A = (r − mean) / (std + 1e-4) over the answers to one prompt; std with n − 1.
    #[default]
    Group,
    /// Dr. GRPO, TRL's `scale_rewards=False`: A = r − mean over the answers to one prompt.
    Centred,
    /// RLOO: A = r − the mean of the other answers to the prompt.
    LeaveOneOut,
    /// A = (r − mean) / (std + 1e-4) over all answers of the rollout; std with n − 1.
    Batch,
    /// A = r.
    None,
}

/// The answers to one prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Of the rewards that are not NaN; NaN if all are.
    pub mean: f32,
    /// Their standard deviation, with n − 1; 0 for a single one.
    pub std: f32,
    /// True if no two rewards differ: the group teaches nothing.
    pub zero_variance: bool,
    /// Index, in the rollout, of the answer with the largest and of the one with the smallest reward, the first of equal ones:
    /// the pair that an online DPO step prefers and rejects. `None` if no two rewards differ.
    pub best_and_worst: Option<(usize, usize)>,
}

/// Mean, and standard deviation with n − 1, of what is not NaN.
fn moments(rewards: &[f32]) -> (f64, f64) {
    let known = || rewards.iter().filter(|r| !r.is_nan()).map(|r| f64::from(*r));
    let count = known().count() as f64;
    let mean = known().sum::<f64>() / count;
    let squares: f64 = known().map(|r| (r - mean).powi(2)).sum();
    (mean, if count > 1.0 { (squares / (count - 1.0)).sqrt() } else { 0.0 })
}

/// Groups of `n` answers each.
pub(super) fn groups(rewards: &[f32], n: usize) -> Vec<Group> {
    let group = |(i, group): (usize, &[f32])| {
        let (mean, std) = moments(group);
        let known = || (0..group.len()).filter(|j| !group[*j].is_nan());
        let best = known().reduce(|a, b| if group[b] > group[a] { b } else { a });
        let worst = known().reduce(|a, b| if group[b] < group[a] { b } else { a });
        let pair = best.zip(worst).filter(|(a, b)| group[*a] != group[*b]);
        Group {
            mean: mean as f32,
            std: std as f32,
            zero_variance: pair.is_none(),
            best_and_worst: pair.map(|(a, b)| (i * n + a, i * n + b)),
        }
    };
    rewards.chunks(n).enumerate().map(group).collect()
}

impl Advantage {
    /// Of rewards in groups of `n`.
    pub(super) fn of(self, rewards: &[f32], n: usize) -> Vec<f32> {
        let batch = moments(rewards);
        let mut advantages = Vec::with_capacity(rewards.len());
        for group in rewards.chunks(n) {
            let (mean, std) = moments(group);
            let count = group.iter().filter(|r| !r.is_nan()).count() as f64;
            advantages.extend(group.iter().map(|reward| {
                let r = f64::from(*reward);
                let advantage = match self {
                    _ if r.is_nan() => 0.0,
                    Advantage::Group => (r - mean) / (std + EPSILON),
                    Advantage::Centred => r - mean,
                    // r − (n·mean − r) / (n − 1); a single one has no others.
                    Advantage::LeaveOneOut if count < 2.0 => 0.0,
                    Advantage::LeaveOneOut => (r - mean) * count / (count - 1.0),
                    Advantage::Batch => (r - batch.0) / (batch.1 + EPSILON),
                    Advantage::None => r,
                };
                advantage as f32
            }));
        }
        advantages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((f64::from(*g) - w).abs() <= 1e-6 * w.abs().max(1.0), "{got:?} {want:?}");
        }
    }

    /// By hand: (1, 2, 4, 5) has mean 3 and std √(10/3).
    #[test]
    fn groups_of_four() {
        let rewards = [1.0, 2.0, 4.0, 5.0, 7.0, 7.0, 7.0, 7.0];
        let std = (10f64 / 3.0).sqrt() + 1e-4;
        close(&Advantage::Group.of(&rewards, 4), &[-2.0 / std, -1.0 / std, 1.0 / std, 2.0 / std, 0.0, 0.0, 0.0, 0.0]);
        close(&Advantage::Centred.of(&rewards, 4), &[-2.0, -1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
        let others = [1.0 - 11.0 / 3.0, 2.0 - 10.0 / 3.0, 4.0 - 8.0 / 3.0, 5.0 - 7.0 / 3.0, 0.0, 0.0, 0.0, 0.0];
        close(&Advantage::LeaveOneOut.of(&rewards, 4), &others);
        // Mean 5, squares 16 + 9 + 1 + 0 + 4 · 4 = 42.
        let std = (42f64 / 7.0).sqrt() + 1e-4;
        let batch = [-4.0, -3.0, -1.0, 0.0, 2.0, 2.0, 2.0, 2.0].map(|d| d / std);
        close(&Advantage::Batch.of(&rewards, 4), &batch);
        close(&Advantage::None.of(&rewards, 4), &rewards.map(f64::from));
        let [first, second] = groups(&rewards, 4)[..] else { panic!() };
        close(&[first.mean, first.std], &[3.0, (10f64 / 3.0).sqrt()]);
        assert_eq!((first.zero_variance, first.best_and_worst), (false, Some((3, 0))));
        assert_eq!((second.zero_variance, second.best_and_worst, second.std), (true, None, 0.0));
    }

    #[test]
    fn what_has_no_reward_takes_no_part() {
        let rewards = [f32::NAN, 1.0, 3.0, f32::NAN, f32::NAN, f32::NAN, 2.0, f32::NAN, f32::NAN];
        let root = 2f64.sqrt() + 1e-4;
        close(&Advantage::Group.of(&rewards, 3), &[0.0, -1.0 / root, 1.0 / root, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        close(&Advantage::LeaveOneOut.of(&rewards, 3), &[0.0, -2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let groups = groups(&rewards, 3);
        assert_eq!(groups[0].best_and_worst, Some((2, 1)));
        assert!(groups[1].mean.is_nan() && groups[1].zero_variance && groups[2].zero_variance);
        assert_eq!((groups[2].mean, groups[2].std), (2.0, 0.0));
    }
}
