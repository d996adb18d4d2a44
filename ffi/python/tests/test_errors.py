"""Every status is an exception that names it; and nothing is used after it was closed."""

import pickle
import re
import threading
import time

import numpy as np
import pytest

import rewardrt
from rewardrt import errors
from rewardrt._native import ffi, lib

from checkpoints import GOLDEN, ROOT


def statuses():
    header = (ROOT / "ffi" / "include" / "rewardrt.h").read_text()
    return [
        (name, int(code)) for name, code in re.findall(r"^ +(RRT_(?:E_\w+|PENDING|TIMEOUT)) = (-?\d+)", header, re.M)
    ]


def test_the_header_was_read():
    assert len(statuses()) >= 28


@pytest.mark.parametrize(("name", "code"), statuses())
def test_every_status_is_an_exception(name, code):
    assert ffi.string(lib.rrt_status_name(code)).decode() == name
    error = errors.of_status(name, code, "what was wrong")
    assert (error.status, error.code, error.message) == (name, code, "what was wrong")
    assert isinstance(error, rewardrt.Error)
    assert str(error) == f"what was wrong ({name})"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, again.code) == (type(error), error.args, error.code)


def test_every_exception_class_belongs_to_a_status():
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, rewardrt.Error)}
    # Closed is Python's own: the library never sees what was closed.
    assert classes - {rewardrt.Error, rewardrt.Closed} == set(errors._BY_STATUS.values())
    assert {c.__name__ for c in classes} <= set(rewardrt.__all__)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m: m.sample([[5]], temperature=-1), rewardrt.ArgumentError, ["temperature", "-1"]),
        (lambda m: m.sample([[5]], n=0), rewardrt.ArgumentError, ["n"]),
        (lambda m: m.sample([]), rewardrt.ArgumentError, ["prompts"]),
        (lambda m: m.sample([5, 6]), rewardrt.ArgumentError, ["prompts[0]", "[[…]]"]),
        (lambda m: m.sample([[5, -1]]), rewardrt.ArgumentError, ["prompts[0]", "-1"]),
        (lambda m: m.sample([[5.5]]), rewardrt.ArgumentError, ["prompts[0]"]),
        (lambda m: m.sample([[5], [101]]), rewardrt.ArgumentError, ["101"]),
        (lambda m: m.sample([[5]], streams=[1, 2]), rewardrt.ArgumentError, ["streams", "2"]),
        (lambda m: m.sample("text"), rewardrt.NotFound, ["tokenizer.json"]),
        (lambda m: m.logprobs([[5, 6]], prompt_lens=[3]), rewardrt.ArgumentError, ["3"]),
        (lambda m: m.score([[5]]), rewardrt.Error, ["rule"]),
        (lambda m: m.update(storage="shadows"), rewardrt.ArgumentError, ["storage", "shadows", "in_place"]),
        (lambda m: m.load_adapter("/no/such/folder"), rewardrt.NotFound, ["/no/such/folder"]),
        (lambda m: m.sample([[5]]).result(timeout=-1), rewardrt.ArgumentError, ["timeout", "-1"]),
    ],
)
def test_the_message_names_the_field_and_the_value(golden, call, kind, words):
    with pytest.raises(kind) as caught:
        call(golden("llama-tied"))
    for word in words:
        assert word in str(caught.value)


def test_loading(runtime, tmp_path):
    with pytest.raises(rewardrt.NotFound, match="nothing-here"):
        runtime.load_model(tmp_path / "nothing-here")
    with pytest.raises(rewardrt.ArgumentError, match="precision is 'f64'"):
        runtime.load_model(GOLDEN / "llama-tied", precision="f64")
    with pytest.raises(rewardrt.LimitError):
        runtime.load_model(GOLDEN / "llama-tied", memory=1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(rewardrt.FormatError):
        runtime.load_model(tmp_path)
    with pytest.raises(rewardrt.NoDevice, match="no-such-gpu"):
        rewardrt.Runtime("gpu:no-such-gpu")
    with pytest.raises(OverflowError):
        rewardrt.Runtime("cpu", threads=-1)


def test_use_after_close(runtime):
    model = runtime.load_model(GOLDEN / "llama-tied")
    update, adapter = model.update(), model.load_adapter(GOLDEN / "adapters" / "tied-all")
    model.close()
    model.close()
    for use in (
        lambda: model.sample([[5]]),
        lambda: model.logprobs([[5]]),
        lambda: model.info,
        lambda: model.update(),
        lambda: model.tensors(),
        lambda: model.sleep(),
        lambda: model.load_adapter(GOLDEN / "adapters" / "tied-all"),
        lambda: model.tokenizer,
        lambda: update.put("x", np.zeros(1, np.float32)),
        lambda: update.commit(),
        lambda: adapter.replace("x", 1),
    ):
        with pytest.raises(rewardrt.Closed, match="closed|ended"):
            use()


def test_a_runtime_closes_what_was_loaded_on_it():
    runtime = rewardrt.Runtime("cpu", threads=1)
    model = runtime.load_model(GOLDEN / "llama-tied")
    job = model.sample([[5]], max_tokens=4, ignore_eos=True)
    done = job.result(60)
    runtime.close()
    runtime.close()
    assert len(done[0].ids) == 4
    for use in (
        lambda: model.sample([[5]]),
        lambda: runtime.load_model(GOLDEN / "llama-tied"),
        lambda: runtime.pause(),
    ):
        with pytest.raises(rewardrt.Closed):
            use()


def test_closing_while_another_thread_waits(smollm2):
    runtime = rewardrt.Runtime("cpu", threads=1)
    model = runtime.load_model(smollm2)
    job = model.sample("Once upon a time", max_tokens=4000, ignore_eos=True)
    outcome = []

    def wait():
        try:
            outcome.append(job.result())
        except rewardrt.Cancelled as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    runtime.close()
    thread.join(30)
    assert not thread.is_alive()
    assert len(outcome) == 1
