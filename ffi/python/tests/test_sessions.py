"""Sessions: several turns equal one prompt. Step scores, following a folder, numbers."""

import shutil

import numpy as np
import pytest

import rewardrt

from checkpoints import GOLDEN, expected, read_safetensors, write_safetensors

TURN = {"max_tokens": 6, "seed": 4, "ignore_eos": True}


def test_turns_equal_one_prompt(golden):
    model = golden("llama-gqa-9-3")
    with model.session([5, 6, 7]) as session:
        first = session.sample(**TURN).result(60)[0]
        assert session.ids.tolist() == [5, 6, 7, *first.ids.tolist()]
        fork = session.fork()
        session.append([8, 9])
        second = session.sample(**TURN).result(60)[0]
        whole = model.sample([[5, 6, 7, *first.ids.tolist(), 8, 9]], **TURN).result(60)[0]
        np.testing.assert_array_equal(second.ids, whole.ids)
        np.testing.assert_array_equal(second.logprobs, whole.logprobs)
        # The fork knows nothing of it.
        other = fork.sample(**TURN).result(60)[0]
        alone = model.sample([[5, 6, 7, *first.ids.tolist()]], **TURN).result(60)[0]
        np.testing.assert_array_equal(other.ids, alone.ids)


def test_a_session_begins_empty_and_takes_text(real):
    session = real.session()
    assert session.ids.size == 0
    session.append("Once upon a time")
    assert session.ids.tolist() == real.tokenizer.encode("Once upon a time").tolist()
    job = session.sample(max_tokens=200, ignore_eos=True)
    with pytest.raises(rewardrt.Busy):
        session.append("x")
    job.cancel()
    job.result(60)
    with pytest.raises(rewardrt.ArgumentError, match="streams"):
        session.sample(streams=[1])
    session.close()
    with pytest.raises(rewardrt.Closed):
        session.append("x")


def test_step_scores(golden):
    """After a step's token a prefix has been seen: its value is the prefix's score."""
    model = golden("llama-labels-3")
    sequences = [s for s in expected("llama-labels-3")["sequences"] if len(s) > 12][:2]
    positions = [[2, 5, len(s) - 1] for s in sequences]
    steps = model.score_steps(sequences, positions=positions, label=1).result(60)
    assert [steps[i].shape for i in range(2)] == [(3, 3), (3, 3)]
    for i, (sequence, places) in enumerate(zip(sequences, positions, strict=True)):
        assert steps.positions(i).tolist() == places
        prefixes = model.score([sequence[: place + 1] for place in places]).result(60)
        np.testing.assert_allclose(steps[i], np.stack(list(prefixes)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(steps.score, [steps[i][-1, 1] for i in range(2)])

    step_id = sequences[0][5]
    by_id = model.score_steps(sequences[:1], step_id=step_id).result(60)
    assert by_id.positions(0).tolist() == [i for i, token in enumerate(sequences[0]) if token == step_id]
    for wrong in ({}, {"step_id": 1, "positions": positions}):
        with pytest.raises(rewardrt.ArgumentError, match="step_id or at positions"):
            model.score_steps(sequences, **wrong)


def test_following_a_folder(golden, tmp_path):
    source = GOLDEN / "qwen2-tied-window"
    model = golden("qwen2-tied-window")
    before = model.logprobs([[5, 6, 7]]).result(60).values.copy()
    with model.follow(tmp_path, interval=0.05) as follower:
        assert follower.updates == 0
        made = tmp_path / "unfinished"
        made.mkdir()
        shutil.copy(source / "config.json", made)
        write_safetensors(
            made / "model.safetensors", {n: v * np.float32(1.5) for n, v in read_safetensors(source).items()}
        )
        made.rename(tmp_path / "step_7")
        follower.wait(7, timeout=30)
        assert (follower.updates, model.version) == (1, 7)
        with pytest.raises(rewardrt.Timeout):
            follower.wait(8, timeout=0.01)
    assert not np.array_equal(before, model.logprobs([[5, 6, 7]]).result(60).values, equal_nan=True)


def test_numbers(golden, runtime):
    model = golden("llama-tied")
    runtime.reset_stats()
    model.sample([[5, 6, 7]], n=2, max_tokens=4, ignore_eos=True).result(60)
    timing = model.timing()
    assert (timing.sampled_tokens, timing.jobs, timing.preemptions) == (8, 0, 0)
    assert runtime.timing().submitted == 1
    memory = model.memory()
    assert memory.allocated == memory.weights + memory.kv_cache + memory.scratch + memory.host + memory.adapters
    assert memory.budget == 2**64 - 1
    assert runtime.memory().models >= 1
    runtime.trim()
    assert runtime.state == "running"
    assert "2 threads" in runtime.device
    runtime.pause()
    assert runtime.state == "paused"
    runtime.resume()


def test_what_a_model_is(real):
    info = real.info
    assert (info.head, info.architecture, info.vocab_size, info.layers) == (
        "language_model",
        "LlamaForCausalLM",
        49152,
        30,
    )
    assert (info.has_tokenizer, info.has_chat_template, info.eos_ids, info.asleep) == (True, True, (2,), ())
    assert "cpu" in {d.type for d in rewardrt.devices()}


def test_a_full_queue_refuses():
    with rewardrt.Runtime("cpu", threads=1, max_jobs=2) as runtime:
        model = runtime.load_model(GOLDEN / "llama-wide")
        runtime.pause()
        jobs = [model.sample([[5]], max_tokens=1) for _ in range(2)]
        with pytest.raises(rewardrt.Full):
            model.sample([[5]], max_tokens=1)
        runtime.resume()
        assert [len(job.result(60)) for job in jobs] == [1, 1]
        assert len(model.sample([[5]], max_tokens=1).result(60)) == 1
