"""Waiting: without the GIL, with time limits, in asyncio, cancelled, forgotten."""

import asyncio
import threading
import time

import numpy as np
import pytest

import rewardrt

LONG = {"max_tokens": 4000, "ignore_eos": True}


def test_the_gil_is_free_while_a_thread_waits(real):
    counted = 0
    waiting = threading.Event()

    def wait():
        waiting.set()
        real.sample("Once upon a time", n=4, max_tokens=48, ignore_eos=True).result()

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    start = time.monotonic()
    longest, last = 0.0, start
    while thread.is_alive():
        counted += 1
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    seconds = time.monotonic() - start
    # A held GIL would let this loop turn once or twice.
    assert seconds > 0.05
    assert counted > 1000
    assert longest < seconds / 2


def test_a_time_limit(real):
    job = real.sample("Once upon a time", **LONG)
    start = time.monotonic()
    with pytest.raises(rewardrt.Timeout) as caught:
        job.result(timeout=0.05)
    assert time.monotonic() - start < 5
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.status == "RRT_TIMEOUT"
    assert not job.done()
    job.cancel()
    assert job.result(60)[0].finish == "cancelled"


def test_a_cancelled_job_returns_what_it_has(real):
    job = real.sample("Once upon a time", **LONG)
    time.sleep(0.3)
    job.cancel()
    job.cancel()
    sample = job.result(60)[0]
    assert sample.finish == "cancelled"
    assert len(sample.ids) < LONG["max_tokens"]
    job.cancel()  # done and taken: nothing happens
    assert job.done()


def test_a_result_may_be_read_again_and_by_many(golden):
    job = golden("llama-tied").sample([[5, 6]], max_tokens=8, ignore_eos=True)
    found = []
    threads = [threading.Thread(target=lambda: found.append(job.result(60))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(result is found[0] for result in found)


def test_gather_of_32_jobs(golden):
    model = golden("llama-gqa-9-3")
    prompts = [[5 + i, 6, 7] for i in range(32)]

    async def gathered():
        jobs = [model.sample([p], max_tokens=8, seed=1, ignore_eos=True, streams=[i]) for i, p in enumerate(prompts)]
        return await asyncio.gather(*jobs)

    together = model.sample(prompts, max_tokens=8, seed=1, ignore_eos=True).result(60)
    for result, want in zip(asyncio.run(gathered()), together, strict=True):
        np.testing.assert_array_equal(result[0].ids, want.ids)
        np.testing.assert_array_equal(result[0].logprobs, want.logprobs)


def test_the_event_loop_turns_while_a_job_is_awaited(real):
    async def both():
        turns = 0
        job = asyncio.ensure_future(real.sample("Once upon a time", max_tokens=24, ignore_eos=True))
        while not job.done():
            turns += 1
            await asyncio.sleep(0.001)
        return turns, (await job)[0]

    turns, sample = asyncio.run(both())
    assert len(sample.ids) == 24
    assert turns > 10


def test_a_cancelled_task_cancels_the_job(real):
    job = real.sample("Once upon a time", **LONG)

    async def cancelled():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job, 0.1)

    asyncio.run(cancelled())
    assert job.result(60)[0].finish == "cancelled"


def test_awaiting_raises_what_the_job_failed_with(runtime, smollm2):
    model = runtime.load_model(smollm2)
    job = model.logprobs(["Once upon a time " * 1000])

    async def closed():
        await job

    model.close()
    with pytest.raises(rewardrt.Cancelled):
        asyncio.run(closed())


def test_a_forgotten_job_is_cancelled(real):
    job = real.sample("Once upon a time", n=8, **LONG)
    while real.timing().running == 0:
        time.sleep(0.001)
    assert real.timing().jobs == 1
    del job
    # To its end it would take minutes.
    end = time.monotonic() + 20
    while real.timing().jobs:
        assert time.monotonic() < end
        time.sleep(0.01)
