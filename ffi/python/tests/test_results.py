"""Results are views of the library's memory: nothing is copied, and nothing is freed too early."""

import dataclasses
import gc
import pickle

import numpy as np
import pytest

import rewardrt
from rewardrt._handle import call, view
from rewardrt._native import ffi, lib
from rewardrt.results import joined


@pytest.fixture
def samples(golden):
    return golden("llama-tied").sample([[5, 6], [7]], n=2, max_tokens=6, seed=1, ignore_eos=True).result(60)


def test_arrays_are_the_librarys_memory(samples):
    found = view("rrt_sequences_view")
    call(lib.rrt_result_sequences, samples.ids.base.owner.pointer, found)

    def address(pointer):
        return int(ffi.cast("uintptr_t", pointer))

    pairs = {
        "ids": found.ids,
        "logprobs": found.sample_logprob,
        "model_logprobs": found.logprob,
        "entropy": found.entropy,
        "kept": found.kept,
        "threshold": found.threshold,
        "ceiling": found.ceiling,
        "offsets": found.offsets,
        "version": found.version,
        "prompt_index": found.prompt_index,
        "sample_index": found.sample_index,
        "finish": found.finish,
    }
    for name, pointer in pairs.items():
        assert getattr(samples, name).ctypes.data == address(pointer), name
    # The parts of one answer are slices of them.
    second = samples[1]
    assert second.ids.ctypes.data == address(found.ids) + 4 * 6
    assert second.logprobs.ctypes.data == address(found.sample_logprob) + 4 * 6


def test_arrays_are_read_only(samples):
    with pytest.raises(ValueError, match="read-only"):
        samples.ids[0] = 1


def test_what_a_sample_says(samples):
    assert len(samples) == 4
    assert [(s.prompt, s.sample) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert samples[-1].ids.tolist() == samples[3].ids.tolist()
    assert [s.finish for s in samples[0:2]] == ["length", "length"]
    assert samples[0].spans == ((6, 0),)
    assert samples[0].text == ""  # the checkpoint has no tokenizer
    assert (samples.kept == 101).all()
    with pytest.raises(IndexError):
        samples[4]


def test_a_view_outlives_everything_else():
    from checkpoints import GOLDEN

    with rewardrt.Runtime("cpu", threads=1) as runtime:
        model = runtime.load_model(GOLDEN / "llama-tied")
        ids = model.sample([[5, 6]], max_tokens=6, seed=1, ignore_eos=True).result(60)[0].ids
        copy = ids.copy()
    del runtime, model
    gc.collect()
    np.testing.assert_array_equal(ids, copy)


def test_pickling_copies(samples):
    again = pickle.loads(pickle.dumps(samples))
    assert again.ids.ctypes.data != samples.ids.ctypes.data
    for one, other in zip(samples, again, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_parts_joined_are_the_whole(golden):
    model = golden("llama-tied")
    prompts, options = [[5, 6], [7], [8, 9, 10]], {"n": 2, "max_tokens": 6, "seed": 1, "ignore_eos": True}
    whole = model.sample(prompts, **options).result(60)
    parts = [model.sample(prompts[:1], streams=[0], **options), model.sample(prompts[1:], streams=[1, 2], **options)]
    together = joined([part.result(60) for part in parts], [0, 1])
    for name, value in vars(whole).items():
        if name != "timing":  # a cost belongs to one job
            np.testing.assert_array_equal(getattr(together, name), value, err_msg=name)
    scores = [model.logprobs(p).result(60) for p in (prompts[:1], prompts[1:])]
    np.testing.assert_array_equal(joined(scores).values, model.logprobs(prompts).result(60).values)


def test_text(real):
    samples = real.sample("The capital of France is", n=2, max_tokens=8, seed=1).result(60)
    for sample in samples:
        assert real.tokenizer.decode(sample.ids) == sample.text
    assert samples.texts == [s.text for s in samples]


def test_a_stop_string_cuts_the_text(real):
    free = real.sample("1, 2, 3,", max_tokens=16, temperature=0).result(60)[0]
    assert "6" in free.text
    cut = real.sample("1, 2, 3,", max_tokens=16, temperature=0, stop=["zzz", "6"]).result(60)[0]
    assert cut.text == free.text[: free.text.index("6")]
    assert cut.finish == "stop"
