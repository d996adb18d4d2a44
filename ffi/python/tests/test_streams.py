"""Tokens as they are sampled; they add up to the result."""

import asyncio
import gc
import threading

import numpy as np
import pytest

import rewardrt

OPTIONS = {"n": 2, "max_tokens": 24, "seed": 6, "ignore_eos": True}
PROMPTS = ["Once upon a time", "The capital of France is"]


def assert_adds_up(chunks, result):
    drawn = len(result) // len(PROMPTS)
    for i, sample in enumerate(result):
        own = [c for c in chunks if (c.prompt, c.sample) == divmod(i, drawn)]
        assert [c.first for c in own] == np.cumsum([0] + [len(c.ids) for c in own]).tolist()[:-1]
        np.testing.assert_array_equal(np.concatenate([c.ids for c in own]), sample.ids)
        np.testing.assert_array_equal(np.concatenate([c.logprobs for c in own]), sample.logprobs)
        np.testing.assert_array_equal(np.concatenate([c.model_logprobs for c in own]), sample.model_logprobs)
        assert "".join(c.text for c in own) == sample.text
        assert [c.finish for c in own] == [None] * (len(own) - 1) + [sample.finish]


def test_a_loop_over_chunks(real):
    stream = real.stream(PROMPTS, **OPTIONS)
    chunks = []
    for chunk in stream:
        assert not (chunks == [] and stream.done()), "the first chunk comes before the end"
        chunks.append(chunk)
    assert len(chunks) > 8
    result = stream.result(60)
    assert_adds_up(chunks, result)
    np.testing.assert_array_equal(result.ids, real.sample(PROMPTS, **OPTIONS).result(60).ids)
    assert list(stream) == []


def test_an_async_loop_while_others_await(real):
    async def read(stream):
        return [chunk async for chunk in stream]

    async def everything():
        streams = [real.stream(PROMPTS, **OPTIONS) for _ in range(3)]
        jobs = [real.sample(PROMPTS, **OPTIONS) for _ in range(3)]
        return streams, await asyncio.gather(*map(read, streams)), await asyncio.gather(*jobs)

    streams, chunks, results = asyncio.run(everything())
    for stream, own, result in zip(streams, chunks, results, strict=True):
        assert_adds_up(own, stream.result(60))
        np.testing.assert_array_equal(stream.result().ids, result.ids)


def test_nothing_is_lost_to_those_who_take_the_events_first(real):
    """Other threads and loops wait for other jobs while nobody reads the stream yet."""
    stream = real.stream(PROMPTS, **OPTIONS)

    async def wait():
        await real.sample(PROMPTS, **OPTIONS)

    threads = [threading.Thread(target=asyncio.run, args=(wait(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.done()
    assert_adds_up(list(stream), stream.result(60))


def test_a_stream_that_is_dropped_or_closed(real):
    for end in (lambda s: s.close(), lambda s: s.cancel(), lambda s: None):
        stream = real.stream(PROMPTS, **{**OPTIONS, "max_tokens": 4000})
        next(iter(stream))
        end(stream)
    del stream
    gc.collect()
    assert len(real.sample(PROMPTS, **OPTIONS).result(60)) == 4


def test_closing_wakes_who_awaits(runtime, smollm2):
    model = runtime.load_model(smollm2)

    async def closed():
        job = asyncio.ensure_future(model.sample("Once", max_tokens=4000, ignore_eos=True))
        stream = model.stream("Once", max_tokens=4000, ignore_eos=True)
        await asyncio.sleep(0.1)
        model.close()
        with pytest.raises(rewardrt.Cancelled):
            await asyncio.wait_for(job, 20)
        return [chunk async for chunk in stream]

    asyncio.run(asyncio.wait_for(closed(), 60))


def test_progress(golden):
    job = golden("llama-tied").sample([[5], [6]], n=3, max_tokens=4, ignore_eos=True)
    while not job.done():
        finished, total = job.progress()
        assert 0 <= finished <= total == 6
    assert job.progress() == (6, 6)
    job.result()
    assert job.progress() == (0, 0)
