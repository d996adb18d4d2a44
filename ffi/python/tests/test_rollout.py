"""Rollouts against the steps done one by one, in numpy."""

import numpy as np
import pytest

import rewardrt
from rewardrt import Reward

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
OPTIONS = {"n": 4, "max_tokens": 10, "seed": 3, "ignore_eos": True}


def completed(samples):
    return [PROMPTS[s.prompt] + s.ids.tolist() for s in samples]


def test_everything(golden):
    """One model samples, another is the reference, a classifier of three labels and one of one label reward."""
    policy, reference = golden("llama-gqa-9-3"), golden("llama-tied")
    three, one = golden("llama-labels-3"), golden("llama-labels-1")
    rewards = [Reward(three, weight=0.5, label=2), Reward(one, weight=-2.0, name="one")]
    rollout = policy.rollout(PROMPTS, reference=reference, rewards=rewards, **OPTIONS).result(60)

    samples = policy.sample(PROMPTS, **OPTIONS).result(60)
    np.testing.assert_array_equal(rollout.ids, samples.ids)
    np.testing.assert_array_equal(rollout.logprobs, samples.logprobs)
    lengths = [len(PROMPTS[s.prompt]) for s in samples]
    np.testing.assert_array_equal(
        rollout.ref_logprobs, reference.logprobs(completed(samples), prompt_lens=lengths).result(60).values
    )

    k1 = rollout.model_logprobs.astype(np.float64) - rollout.ref_logprobs
    np.testing.assert_allclose(rollout.kl1, k1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rollout.kl2, k1**2 / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rollout.kl3, np.exp(-k1) - 1 + k1, rtol=1e-4, atol=1e-5)

    scores = np.stack(
        [three.score(completed(samples), label=2).result(60).score, one.score(completed(samples)).result(60).score]
    )
    np.testing.assert_array_equal(rollout.rewards, scores)
    reward = 0.5 * scores[0] - 2.0 * scores[1]
    np.testing.assert_allclose(rollout.reward, reward, rtol=1e-5, atol=1e-6)
    groups = reward.reshape(3, 4).astype(np.float64)
    np.testing.assert_allclose(rollout.group_mean, groups.mean(1), rtol=1e-5, atol=1e-6)
    # torch's std, which TRL takes, is the unbiased one.
    np.testing.assert_allclose(rollout.group_std, groups.std(1, ddof=1), rtol=1e-4, atol=1e-5)
    want = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rollout.advantages, want.ravel(), rtol=1e-3, atol=1e-4)
    assert rollout.group_best.tolist() == (groups.argmax(1) + [0, 4, 8]).tolist()
    assert rollout.group_worst.tolist() == (groups.argmin(1) + [0, 4, 8]).tolist()
    assert rollout.group_zero_variance.tolist() == [0, 0, 0]


@pytest.mark.parametrize("advantage", ["leave_one_out", "batch", "centred", "none"])
def test_other_advantages(golden, advantage):
    policy, one = golden("llama-gqa-9-3"), golden("llama-labels-1")
    rollout = policy.rollout(
        PROMPTS, rewards=[Reward(one)], advantage=advantage, clip_reward=(-0.5, 0.5), **OPTIONS
    ).result(60)
    scores = rollout.rewards[0].astype(np.float64)
    r = np.clip(scores, -0.5, 0.5)
    np.testing.assert_allclose(rollout.reward, r, atol=1e-6)
    groups = r.reshape(3, 4)
    want = {
        "leave_one_out": groups - (groups.sum(1, keepdims=True) - groups) / 3,
        "batch": (groups - r.mean()) / (r.std(ddof=1) + 1e-4),
        "centred": groups - groups.mean(1, keepdims=True),
        "none": groups,
    }[advantage]
    np.testing.assert_allclose(rollout.advantages, want.ravel(), rtol=1e-3, atol=1e-4)
    assert (rollout.advantages != 0).any()
    assert rollout.ref_logprobs.size == rollout.kl1.size == 0


def test_the_policy_as_its_own_reference_has_no_kl(golden):
    policy = golden("llama-gqa-9-3", precision="auto")
    rollout = policy.rollout(PROMPTS, reference=policy, **OPTIONS).result(60)
    np.testing.assert_array_equal(rollout.ref_logprobs, rollout.model_logprobs)
    for kl in (rollout.kl1, rollout.kl2, rollout.kl3):
        assert (kl == 0).all()
    assert rollout.rewards.shape == (0, 12)


def test_the_base_of_an_adapter_is_the_reference(golden):
    from checkpoints import GOLDEN

    policy = golden("llama-tied")
    with policy.load_adapter(GOLDEN / "adapters" / "tied-all") as adapter:
        rollout = policy.rollout(PROMPTS, reference="base", adapter=adapter, **OPTIONS).result(60)
        lengths = [len(PROMPTS[s.prompt]) for s in rollout]
        base = policy.logprobs(completed(rollout), prompt_lens=lengths).result(60)
        np.testing.assert_array_equal(rollout.ref_logprobs, base.values)
        assert (rollout.kl1 != 0).any()


def test_conversations(real):
    """A judge of the same vocabulary sees the rendered conversation, with its answer."""
    turns = [[{"role": "user", "content": "Say yes."}], [{"role": "user", "content": "Say no."}]]
    rollout = real.rollout(turns, rewards=[Reward(real, rule="judge: yes, no")], n=2, max_tokens=4, seed=1).result(60)
    prompts = [real.tokenizer.chat(t).tolist() for t in turns]
    want = real.score([prompts[s.prompt] + s.ids.tolist() for s in rollout], rule="judge: yes, no").result(60)
    np.testing.assert_array_equal(rollout.reward, want.score)


def test_a_judge_is_asked_a_question(real):
    """The question with the texts in it, as a conversation of its own."""
    turns = [[{"role": "user", "content": "Is water wet?"}], [{"role": "user", "content": "Is fire cold?"}]]
    reward = Reward(real, rule="judge: yes, no", question="{prompt}\nAnswer: {answer}\nIs it right?")
    rollout = real.rollout(turns, rewards=[reward], max_tokens=4, seed=1, ignore_eos=True).result(60)
    asked = [
        [{"role": "user", "content": f"{turns[s.prompt][-1]['content']}\nAnswer: {s.text}\nIs it right?"}]
        for s in rollout
    ]
    np.testing.assert_array_equal(rollout.reward, real.score(asked, rule="judge: yes, no").result(60).score)


def test_versions_of_rewards_and_of_the_reference(golden):
    policy, reference, one = (
        golden("llama-gqa-9-3"),
        golden("llama-tied", version=7),
        golden("llama-labels-1", version=5),
    )
    rollout = policy.rollout(PROMPTS, reference=reference, rewards=[Reward(one)], **OPTIONS).result(60)
    np.testing.assert_array_equal(rollout.reward_version, np.full((1, 12), 5, np.uint64))
    np.testing.assert_array_equal(rollout.ref_version, np.full(12, 7, np.uint64))
    without = policy.rollout(PROMPTS, **OPTIONS).result(60)
    assert without.reward_version.shape == (0, 12)
    assert without.ref_version.size == 0


def test_a_group_without_variance_has_no_best(golden):
    policy, one = golden("llama-gqa-9-3"), golden("llama-labels-1")
    rollout = policy.rollout(PROMPTS, rewards=[Reward(one)], **{**OPTIONS, "temperature": 0.0}).result(60)
    assert rollout.group_zero_variance.tolist() == [1, 1, 1]
    assert rollout.group_best.tolist() == rollout.group_worst.tolist() == [-1, -1, -1]


def test_refusals(golden):
    policy = golden("llama-gqa-9-3")
    with pytest.raises(rewardrt.ArgumentError, match="advantage is 'grpo'"):
        policy.rollout(PROMPTS, advantage="grpo")
    with pytest.raises(rewardrt.ArgumentError, match="reference is 'self'"):
        policy.rollout(PROMPTS, reference="self")
    with pytest.raises(rewardrt.ArgumentError, match=r"label 5|mine"):
        policy.rollout(PROMPTS, rewards=[Reward(golden("llama-labels-3"), label=5, name="mine")])
