"""Values equal those of transformers in f32 (tests/golden/make.py)."""

import json

import numpy as np
import pytest

import rewardrt

from checkpoints import GOLDEN, expected, read_safetensors

LANGUAGE_MODELS = ["llama-gqa-9-3", "llama-shards", "llama-tied", "mistral-window", "qwen2-gqa-14-2"]
CLASSIFIERS = ["llama-labels-1", "llama-labels-3", "mistral-labels-2", "qwen2-labels-2"]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logprobs(golden, name):
    want = expected(name)
    result = golden(name).logprobs(want["sequences"], top_logprobs=3).result(60)
    assert len(result) == len(want["sequences"])
    for row, values in zip(result, want["logprobs"], strict=True):
        assert np.isnan(row[0])
        np.testing.assert_allclose(row[1:], values, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.sums, [sum(v) for v in want["logprobs"]], atol=1e-3)
    for i, (entropies, top) in enumerate(zip(want["entropies"], want["top"], strict=True)):
        row = slice(int(result.offsets[i]) + 1, int(result.offsets[i + 1]))
        np.testing.assert_allclose(result.entropy[row], entropies, rtol=1e-4, atol=1e-4)
        for (ids, logprobs), (want_ids, want_logprobs) in zip(result.top(i)[1:], top, strict=True):
            assert ids.tolist() == want_ids
            np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_greedy(golden, name):
    want = expected(name)["greedy"]
    count = len(want["completion"])
    job = golden(name).sample([want["prompt"]], max_tokens=count, temperature=0, ignore_eos=True)
    assert job.result(60)[0].ids.tolist() == want["completion"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores(golden, name):
    want = expected(name)
    scores = golden(name).score(want["sequences"]).result(60)
    for row, values in zip(scores, want["scores"], strict=True):
        np.testing.assert_allclose(row, values, rtol=1e-4, atol=1e-4)
    assert len(scores.labels) == len(want["scores"][0])
    np.testing.assert_array_equal(scores.score, [row[0] for row in scores])
    last = golden(name).score(want["sequences"], label=len(scores.labels) - 1).result(60)
    np.testing.assert_array_equal(last.score, [row[-1] for row in scores])


def test_an_adapter(golden):
    """PEFT's own values; and the base keeps its own beside it."""
    folder = GOLDEN / "adapters" / "tied-all"
    model = golden("llama-tied")
    want, base = expected("adapters/tied-all"), expected("llama-tied")
    with model.load_adapter(folder, version=5) as adapter:
        adapted = model.logprobs(want["sequences"], adapter=adapter)
        plain = model.logprobs(base["sequences"])
        for row, values in zip(adapted.result(60), want["logprobs"], strict=True):
            np.testing.assert_allclose(row[1:], values, rtol=1e-4, atol=1e-4)
        for row, values in zip(plain.result(60), base["logprobs"], strict=True):
            np.testing.assert_allclose(row[1:], values, rtol=1e-4, atol=1e-4)
        assert set(adapted.result().adapter_version.tolist()) == {5}

        adapter.merge(version=1)
        for row, values in zip(model.logprobs(want["sequences"]).result(60), want["logprobs"], strict=True):
            # Merged weights are rounded to bf16.
            np.testing.assert_allclose(row[1:], values, rtol=0.02, atol=0.1)
        adapter.unmerge(version=2)
        after = model.logprobs(base["sequences"]).result(60)
        np.testing.assert_array_equal(after.values, plain.result().values)


class LikePeft:
    """What a ``peft.LoraConfig`` is to a reader: fields with sets in them."""

    def __init__(self, fields):
        self.fields = fields

    def to_dict(self):
        return {**self.fields, "target_modules": set(self.fields["target_modules"])}


def test_an_adapter_from_memory(golden):
    """From its config and numpy arrays, the bits that the folder gives."""
    folder = GOLDEN / "adapters" / "tied-all"
    model, sequences = golden("llama-tied"), expected("adapters/tied-all")["sequences"]
    fields = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_safetensors(folder, "adapter_model.safetensors")

    def says(adapter=None):
        return model.logprobs(sequences, adapter=adapter).result(60)

    base, want = says(), says(model.load_adapter(folder))
    for config in [fields, json.dumps(fields), LikePeft(fields)]:
        with model.adapter_from_config(config, version=3) as adapter:
            blank = says(adapter)
            np.testing.assert_allclose(blank.values, base.values, rtol=1e-6)
            with adapter.update(version=4, expect_version=3) as update:
                update.put_all(tensors)
            after = says(adapter)
            np.testing.assert_array_equal(after.values, want.values)
            assert (set(blank.adapter_version.tolist()), set(after.adapter_version.tolist())) == ({3}, {4})
            with pytest.raises(rewardrt.ShapeError, match="lora_A"), adapter.update(version=5) as update:
                update.put_slice(next(iter(tensors)), np.zeros((1, 1), np.float32), [0, 0])
            with pytest.raises(rewardrt.Conflict):
                adapter.update(version=5, expect_version=3)
            np.testing.assert_array_equal(says(adapter).values, want.values)
            left = adapter.update(version=6)
        with pytest.raises(rewardrt.Closed):
            left.commit()
    for wrong in [7, {"peft_type": object()}]:
        with pytest.raises(rewardrt.ArgumentError, match="config"):
            model.adapter_from_config(wrong)


def test_sampling_and_scoring_agree_to_the_bit(golden):
    model = golden("llama-gqa-9-3", precision="auto")
    prompts = [[5, 6, 7], [8, 9]]
    samples = model.sample(prompts, n=3, max_tokens=12, seed=7, ignore_eos=True).result(60)
    sequences = [prompts[s.prompt] + s.ids.tolist() for s in samples]
    scored = model.logprobs(sequences, prompt_lens=[len(prompts[s.prompt]) for s in samples]).result(60)
    np.testing.assert_array_equal(scored.values, samples.model_logprobs)
    # Temperature 1 and nothing cut: it was drawn from the model's distribution.
    np.testing.assert_array_equal(samples.logprobs, samples.model_logprobs)


def test_streams_name_the_draws(golden):
    """A sample is a function of (seed, stream, sample), not of what else is in the request."""
    model = golden("llama-gqa-9-3")
    options = {"max_tokens": 8, "seed": 3, "ignore_eos": True}
    together = model.sample([[5, 6], [7, 8], [5, 6]], n=2, streams=[10, 11, 12], **options).result(60)
    alone = model.sample([[5, 6]], n=2, streams=[12], **options).result(60)
    assert [s.ids.tolist() for s in together[4:6]] == [s.ids.tolist() for s in alone]
    assert together[0].ids.tolist() != together[4].ids.tolist()
