"""The options of sampling: each does what it says, and an unknown one is refused."""

import json
import re

import numpy as np
import pytest

import rewardrt

SAMPLING = {"n": 4, "max_tokens": 12, "seed": 2, "ignore_eos": True}


def test_filters_rebuild_the_distribution(golden):
    """What was kept, and the log-probs in it, follow from the model's own log-probs and the options."""
    model = golden("llama-gqa-9-3")
    prompt, temperature = [5, 6, 7], 0.8
    samples = model.sample(
        [prompt], temperature=temperature, top_k=20, top_p=0.9, top_logprobs=100, kept_ids=64, **SAMPLING
    ).result(60)
    for i, sample in enumerate(samples):
        for place, (ids, logprobs) in enumerate(samples.top(i)):
            scaled = logprobs.astype(np.float64) / temperature
            p = np.exp(scaled - scaled.max())
            order = ids[:20]
            p = p[:20] / p[:20].sum()
            kept = order[: int(np.searchsorted(np.cumsum(p), 0.9)) + 1]
            assert sample.kept[place] == len(kept)
            assert sorted(samples.kept_ids(i)[place].tolist()) == sorted(kept.tolist())
            own = p[: len(kept)] / p[: len(kept)].sum()
            drawn = order.tolist().index(sample.ids[place])
            assert sample.logprobs[place] == pytest.approx(np.log(own[drawn]), abs=1e-4)
            assert sample.model_logprobs[place] == logprobs[ids.tolist().index(sample.ids[place])]


def test_bias_bans_and_choices_of_tokens(golden):
    model = golden("llama-gqa-9-3")
    allowed = model.sample([[5]], allowed_ids=[9, 11], **SAMPLING).result(60)
    assert set(allowed.ids.tolist()) <= {9, 11}
    banned = model.sample([[5]], allowed_ids=[9, 11], banned_ids=[9], **SAMPLING).result(60)
    assert set(banned.ids.tolist()) == {11}
    biased = model.sample([[5]], logit_bias={7: 1000.0}, **SAMPLING).result(60)
    assert set(biased.ids.tolist()) == {7}
    without = model.sample([[5]], logit_bias={7: float("-inf")}, **SAMPLING).result(60)
    assert 7 not in without.ids.tolist()


def test_min_tokens_and_best_of(golden):
    model = golden("llama-gqa-9-3")
    assert (np.diff(model.sample([[5]], n=8, max_tokens=12, min_tokens=12).result(60).offsets) == 12).all()
    all_of_them = model.sample([[5]], **{**SAMPLING, "n": 6}).result(60)
    best = model.sample([[5]], best_of=6, **{**SAMPLING, "n": 2}).result(60)
    means = sorted((float(s.model_logprobs.mean()) for s in all_of_them), reverse=True)
    assert [float(s.model_logprobs.mean()) for s in best] == pytest.approx(means[:2], abs=1e-6)


def test_guides(real):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    text = real.sample("A person as JSON:", json_schema=schema, max_tokens=64, seed=1).result(60)[0].text
    assert set(json.loads(text)) == {"name", "age"}
    text = real.sample("A date:", regex=r"\d{4}-\d{2}-\d{2}", max_tokens=32).result(60)[0].text
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)
    text = real.sample("Is the sky blue?", choices=["yes, it is", "no, not at all"], max_tokens=32).result(60)[0].text
    assert text in ("yes, it is", "no, not at all")
    text = real.sample("A greeting:", grammar='start: "hello" | "good day"', max_tokens=32).result(60)[0].text
    assert text in ("hello", "good day")
    with pytest.raises(rewardrt.ArgumentError, match="regex and choices"):
        real.sample("x", regex="a", choices=["a"])


def test_options_that_cost_nothing_change_nothing(golden):
    model = golden("llama-gqa-9-3")
    want = model.sample([[5, 6]], **SAMPLING).result(60)
    for options in (
        {"speculate": 4},
        {"priority": 3},
        {"deadline": 60.0},
        {"top_logprobs": 5},
        {"min_p": 0.0, "typical_p": 1.0},
    ):
        got = model.sample([[5, 6]], **SAMPLING, **options).result(60)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.logprobs, want.logprobs)


def test_a_deadline(real):
    sample = real.sample("Once upon a time", max_tokens=4000, ignore_eos=True, deadline=0.3).result(60)[0]
    assert sample.finish == "cancelled"
    for wrong in (0, -1, float("nan")):
        with pytest.raises(rewardrt.ArgumentError, match="deadline"):
            real.sample("x", deadline=wrong)


def test_unknown_and_wrong_options(golden):
    model = golden("llama-tied")
    with pytest.raises(TypeError, match="'temprature'.*temperature"):
        model.sample([[5]], temprature=1.0)
    for option, value in {"top_p": 2.0, "min_p": -1.0, "repetition_penalty": 0.0, "typical_p": 5.0}.items():
        with pytest.raises(rewardrt.ArgumentError, match=option):
            model.sample([[5]], **{option: value})
    with pytest.raises(rewardrt.ArgumentError, match="allowed_ids is empty"):
        model.sample([[5]], allowed_ids=[])
    with pytest.raises(OverflowError):
        model.sample([[5]], top_k=-1)


def test_what_a_job_has_cost(golden):
    timing = golden("llama-tied").sample([[5, 6, 7]], n=2, max_tokens=4, ignore_eos=True).result(60).timing
    assert (timing.sampled_tokens, timing.preemptions) == (8, 0)
    assert timing.prefill_rows + timing.cached_rows >= 3
    assert timing.elapsed_ns >= timing.queued_ns > 0
