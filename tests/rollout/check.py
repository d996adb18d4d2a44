"""Checks what `rewardrt rollout` wrote against numpy: KL estimators, totals, advantages, groups.

usage: check.py ROLLOUT.jsonl ADVANTAGE WEIGHT[,WEIGHT…] [identical]

The formulas are TRL's (GRPO, Dr. GRPO, RLOO) and Schulman's (k1, k2, k3). With `identical` policy and reference are the same
weights, and KL must be zero to the bit.
"""

import json
import sys

import numpy as np

path, advantage, weights, *rest = sys.argv[1:]
weights = np.array([float(w) for w in weights.split(",")])
lines = [json.loads(line) for line in open(path, encoding="utf-8")]
nan = lambda value: np.nan if value is None else value
near = lambda got, want: np.testing.assert_allclose(np.array(got, np.float64), want, rtol=2e-6, atol=2e-6)

for line in lines:
    policy = np.array(line["model_logprobs"], np.float32).astype(np.float64)
    assert len(policy) == len(line["completion_ids"]) == len(line["entropy"]) > 0
    if "ref_logprobs" in line:
        d = policy - np.array(line["ref_logprobs"], np.float32).astype(np.float64)
        near(line["kl"]["k1"], d)
        near(line["kl"]["k2"], d**2 / 2)
        near(line["kl"]["k3"], np.exp(-d) - 1 + d)
        if "identical" in rest:
            assert line["ref_logprobs"] == line["model_logprobs"], line["id"]
            assert all(v == 0 for k in ("k1", "k2", "k3") for v in line["kl"][k]), line["id"]

rewards = np.array([[nan(v) for v in line["rewards"].values()] for line in lines])
reward = np.where(np.isnan(rewards).all(1), np.nan, np.nansum(rewards * weights, axis=1))
near([nan(line["reward"]) for line in lines], reward)

n = 1 + max(line["sample"] for line in lines)
groups = reward.reshape(-1, n)
count = (~np.isnan(groups)).sum(1, keepdims=True)
mean = np.nanmean(groups, axis=1, keepdims=True)
std = np.where(count > 1, np.nanstd(groups, axis=1, ddof=1, keepdims=True), 0)
want = {
    "grpo": (groups - mean) / (std + 1e-4),
    "dr-grpo": groups - mean,
    "rloo": groups - (np.nansum(groups, 1, keepdims=True) - groups) / (count - 1),
    "batch": (groups - np.nanmean(reward)) / (np.nanstd(reward, ddof=1) + 1e-4),
    "none": groups,
}[advantage]
near([line["advantage"] for line in lines], np.nan_to_num(want).reshape(-1))

for i, group in enumerate(groups):
    seen = [line["group"] for line in lines[i * n : (i + 1) * n]]
    known = group[~np.isnan(group)]
    flat = known.size == 0 or known.max() == known.min()
    assert all(g["zero_variance"] == flat for g in seen)
    places = [g["place"] for g in seen]
    if flat:
        assert places == [None] * n
    else:
        assert group[places.index("best")] == known.max() and group[places.index("worst")] == known.min()
        near(seen[0]["mean"], mean[i, 0])
        near(seen[0]["std"], std[i, 0])
print(f"{len(lines)} answers, {len(groups)} groups, {len(weights)} rewards: equal to numpy's")
