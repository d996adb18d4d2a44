"""rewardrt.ray on a local cluster of several worker processes, of which some are killed."""

import os
import signal
import threading

import numpy as np
import pytest
import ray

import rewardrt
import rewardrt.ray

from checkpoints import GOLDEN, SMOLLM2, expected, read_safetensors

CLASSIFIER, F32 = "llama-labels-3", "qwen2-tied-window"
PROMPTS = [[5 + i, 6, 7 + i % 3] for i in range(30)]
SAMPLING = {"n": 2, "max_tokens": 12, "seed": 9, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pool():
    with rewardrt.ray.Pool(GOLDEN / F32, actors=2, device="cpu", model_options={"precision": "f32"}) as pool:
        yield pool


def assert_equal(got, want):
    assert type(got) is type(want)
    for name, value in vars(want).items():
        if name == "timing":  # a cost belongs to one job
            continue
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)


def test_two_actors_return_what_one_runtime_returns(pool, golden):
    assert len({ray.get(actor.process.remote()) for actor in pool.actors} | {os.getpid()}) == 3
    model = golden(F32)
    assert_equal(pool.sample(PROMPTS, **SAMPLING), model.sample(PROMPTS, **SAMPLING).result(60))
    streams = [7 * i for i in range(30)]
    assert_equal(
        pool.sample(PROMPTS, streams=streams, **SAMPLING), model.sample(PROMPTS, streams=streams, **SAMPLING).result(60)
    )
    lengths = [1 + i % 2 for i in range(30)]
    assert_equal(pool.logprobs(PROMPTS, prompt_lens=lengths), model.logprobs(PROMPTS, prompt_lens=lengths).result(60))
    assert_equal(pool.sample(PROMPTS[:1], **SAMPLING), model.sample(PROMPTS[:1], **SAMPLING).result(60))


def test_scores():
    want = expected(CLASSIFIER)
    with rewardrt.ray.Pool(GOLDEN / CLASSIFIER, actors=2, device="cpu", model_options={"precision": "f32"}) as pool:
        scores = pool.score(want["sequences"])
    for row, values in zip(scores, want["scores"], strict=True):
        np.testing.assert_allclose(row, values, rtol=1e-4, atol=1e-4)


def test_errors_arrive_as_they_are(pool):
    with pytest.raises(rewardrt.ArgumentError, match="temperature") as caught:
        pool.sample(PROMPTS, temperature=-1.0)
    assert caught.value.status == "RRT_E_ARG"
    with pytest.raises(rewardrt.ArgumentError, match="streams"):
        pool.sample(PROMPTS, streams=[1])
    with pytest.raises(rewardrt.ArgumentError, match="actors is 0"):
        rewardrt.ray.Pool(GOLDEN / F32, actors=0)
    assert pool.losses == 0


def test_an_update_reaches_all_actors(pool, golden):
    weights = {name: value * np.float32(1.25) for name, value in read_safetensors(GOLDEN / F32).items()}
    assert pool.update(weights) == 1
    model = golden(F32)
    with model.update() as update:
        update.put_all(weights)
    assert_equal(pool.sample(PROMPTS, **SAMPLING), model.sample(PROMPTS, **SAMPLING).result(60))
    assert pool.version == 1


def test_an_update_that_fails_changes_no_actor(pool, golden):
    weights = read_safetensors(GOLDEN / F32)
    wrong = {**weights, "model.norm.weight": weights["model.norm.weight"][:-1]}
    with pytest.raises(rewardrt.ShapeError, match=r"model\.norm\.weight"):
        pool.update(wrong)
    del wrong["model.norm.weight"]
    with pytest.raises(rewardrt.ShapeError, match=r"model\.norm\.weight"):
        pool.update(wrong)
    assert pool.version == 0
    assert [ray.get(actor.version.remote()) for actor in pool.actors] == [0, 0]
    assert_equal(pool.sample(PROMPTS, **SAMPLING), golden(F32).sample(PROMPTS, **SAMPLING).result(60))
    assert pool.update(weights, version=9) == 9


def test_a_killed_actor_changes_no_result(runtime):
    """One of two is killed while it samples with weights that were pushed, and once more between two calls."""
    prompts = [f"The number {i} is" for i in range(12)]
    options = {"max_tokens": 96, "seed": 4, "ignore_eos": True}
    with runtime.load_model(SMOLLM2) as model, rewardrt.ray.Pool(SMOLLM2, actors=2, device="cpu", threads=1) as pool:
        name = "model.norm.weight"
        shape = next(t.shape for t in model.tensors() if t.name == name)
        change = {name: (np.ones(shape, np.float32) * np.float32(2))}
        with model.update(require="subset", convert=True) as update:
            update.put_all(change)
        want = model.sample(prompts, **options).result()
        pool.update(change, require="subset", convert=True)

        victim = ray.get(pool.actors[0].process.remote())
        timer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
        timer.start()
        got = pool.sample(prompts, **options)
        assert not timer.is_alive()
        assert pool.losses == 1
        assert_equal(got, want)

        victim = ray.get(pool.actors[1].process.remote())
        os.kill(victim, signal.SIGKILL)
        assert_equal(pool.sample(prompts, **options), want)
        assert pool.losses == 2
        assert victim not in [ray.get(actor.process.remote()) for actor in pool.actors]


def test_an_actor_killed_before_an_update(pool, golden):
    os.kill(ray.get(pool.actors[0].process.remote()), signal.SIGKILL)
    weights = {name: value * np.float32(1.25) for name, value in read_safetensors(GOLDEN / F32).items()}
    pool.update(weights)
    assert pool.losses == 1
    assert [ray.get(actor.version.remote()) for actor in pool.actors] == [1, 1]


def test_a_version_that_all_have_is_refused(pool):
    with pytest.raises(rewardrt.ArgumentError, match="version is 0"):
        pool.update(read_safetensors(GOLDEN / F32), version=0)
    assert pool.update(read_safetensors(GOLDEN / F32)) == 1


class Refusing:
    """An actor that commits a version that its model has already, which the library refuses."""

    def __init__(self, actor):
        self._actor = actor
        self.commit = self

    def remote(self, version):
        return self._actor.commit.remote(0)

    def __getattr__(self, name):
        return getattr(self._actor, name)


def test_a_commit_that_fails_on_one_actor_changes_none(pool, golden):
    before = pool.sample(PROMPTS, **SAMPLING)
    weights = {name: value * np.float32(1.25) for name, value in read_safetensors(GOLDEN / F32).items()}
    committed, actor = ray.get(pool.actors[0].process.remote()), pool.actors[1]
    pool.actors[1] = Refusing(actor)
    with pytest.raises(rewardrt.ArgumentError, match="0"):
        pool.update(weights)
    pool.actors[1] = actor
    assert pool.version == 0
    assert_equal(pool.sample(PROMPTS, **SAMPLING), before)
    # The one that had committed was started anew, the other one goes on.
    pool._all_ready()
    assert [ray.get(actor.version.remote()) for actor in pool.actors] == [0, 0]
    assert ray.get(pool.actors[0].process.remote()) != committed
    assert pool.actors[1] is actor
    assert pool.update(weights) == 1
    assert [ray.get(actor.version.remote()) for actor in pool.actors] == [1, 1]


def test_what_is_no_error_of_the_library_aborts_too(pool, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(TypeError, match="not iterable"):
        patched.setattr(rewardrt.ray, "_chunks", lambda tensors: iter([17]))  # the actors cannot take it apart
        pool.update({})
    assert pool.version == 0
    assert pool.update(read_safetensors(GOLDEN / F32)) == 1


def test_a_folder_that_is_not_there():
    with pytest.raises(rewardrt.NotFound, match="no-such-folder"):
        rewardrt.ray.Pool("no-such-folder", actors=2, device="cpu")


def test_an_actor_killed_again_while_it_loads(pool, golden):
    """Its work goes to the other one, and to whoever is ready then."""
    weights = {name: value * np.float32(1.25) for name, value in read_safetensors(GOLDEN / F32).items()}
    pool.update(weights)
    want = pool.sample(PROMPTS, **SAMPLING)
    for _ in range(2):
        ray.kill(pool.actors[0])
        assert_equal(pool.sample(PROMPTS, **SAMPLING), want)
    first = pool.losses
    assert first >= 1
    # Whether it is ready or not: an update waits for it.
    ray.kill(pool.actors[0])
    pool.update(weights)
    assert pool.losses > first
    assert [ray.get(actor.version.remote()) for actor in pool.actors] == [2, 2]


def test_closed(pool):
    pool.close()
    with pytest.raises(rewardrt.Closed):
        pool.sample(PROMPTS)


def test_ray_data():
    want = expected(CLASSIFIER)
    rows = [{"ids": ids, "row": i} for i, ids in enumerate(want["sequences"])]
    scored = (
        ray.data.from_items(rows)
        .map_batches(
            rewardrt.ray.Scorer,
            fn_constructor_kwargs={
                "path": str(GOLDEN / CLASSIFIER),
                "column": "ids",
                "label": 1,
                "device": "cpu",
                "model_options": {"precision": "f32"},
            },
            concurrency=2,
            batch_size=2,
        )
        .take_all()
    )
    assert len(scored) == len(rows)
    for row in scored:
        assert row["score"] == pytest.approx(want["scores"][row["row"]][1], abs=1e-4)
