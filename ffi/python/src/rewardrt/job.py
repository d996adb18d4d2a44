"""Work under way."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import select
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from . import errors
from ._handle import Handle, Patience, call, open_handle, raise_for
from ._native import ffi, lib
from .events import Event, Events
from .results import FINISH, Samples

T = TypeVar("T")


@dataclass(frozen=True)
class Live:
    """What a job needs until its result was taken.

    ``kept`` are the models and adapters of its request: a model would take its jobs with it, and a runtime must not be
    closed while a job of another one uses its models.
    """

    runtime: Handle
    kept: tuple[Handle, ...]
    events: Events
    number: int


class Job(Generic[T]):
    """Something the engine computes meanwhile: wait with :meth:`result`, or ``await`` it.

    It keeps its model until it is done. A job that nobody refers to any more is cancelled.
    """

    def __init__(self, live: Live, read: Callable[[Handle], T]) -> None:
        self._live: Live | None = live
        self._read = read
        self._lock = threading.Lock()
        self._outcome: tuple[T | None, errors.Error | None] | None = None
        self._forget = weakref.finalize(self, _drop, live.events, live.number)
        self._forget.atexit = False

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return self._wait(0.0)

    def result(self, timeout: float | None = None) -> T:
        """Waits, at most ``timeout`` seconds, and returns the result or raises what the job failed with.

        The GIL is released while it waits. :class:`Timeout` if the job is not done; it goes on, and may be waited for
        again. A cancelled sampling job returns the tokens it got.
        """
        if not self._wait(timeout):
            raise errors.Timeout(f"the job was not done within {timeout} seconds", "RRT_TIMEOUT", lib.RRT_TIMEOUT)
        return self._take()

    def cancel(self) -> None:
        """Asks the job to stop, which it does within one step. Nothing happens if it is done."""
        live = self._live
        if live is not None:
            try:
                call(lib.rrt_job_cancel, live.runtime, live.number)
            except errors.NotFound:
                pass  # another thread is taking its result

    def progress(self) -> tuple[int, int]:
        """Sequences that have ended, and sequences in all; (0, 0) once the result was taken."""
        live = self._live
        counts = ffi.new("size_t[2]")
        if live is not None:
            try:
                call(lib.rrt_job_progress, live.runtime, live.number, counts, counts + 1)
            except errors.NotFound:
                return 0, 0  # another thread has taken its result
        return counts[0], counts[1]

    def close(self) -> None:
        """Ends and forgets the job, which then fails with :class:`Cancelled`; nothing happens if it is done."""
        with contextlib.suppress(errors.Error):
            if self.done():
                self._take()
        with self._lock:
            live = self._live
            if live is not None:
                closed = errors.Cancelled("the job or its model was closed", "RRT_E_CANCELLED", lib.RRT_E_CANCELLED)
                self._outcome, self._live = (None, closed), None
        # Outside of the lock: it calls the job's followers.
        self._forget()

    def __await__(self) -> Generator[Any, None, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        live = self._live
        loop = asyncio.get_running_loop()
        if live is not None:
            try:
                if live.events.fd is None:
                    await loop.run_in_executor(None, self._wait, None)
                else:
                    await self._ended(live, loop)
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self._take()

    async def _ended(self, live: Live, loop: asyncio.AbstractEventLoop) -> None:
        ended = asyncio.Event()

        def told(event: Event) -> None:
            # Another thread may tell it to a loop that has closed.
            if event.last:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(ended.set)

        with live.events.in_loop(loop), live.events.following(live.number, told):
            # Its last event may have been taken before it was followed.
            if not self.done():
                await ended.wait()

    def _wait(self, timeout: float | None) -> bool:
        patience = Patience(timeout)
        error = ffi.new("rrt_error *")
        while (live := self._live) is not None:
            number = ffi.new("uint64_t *", live.number)
            status = lib.rrt_wait(live.runtime.pointer, number, 1, lib.RRT_WAIT_ALL, patience.slice(), error)
            # Another thread's call must not be what keeps the runtime.
            del live
            if status == lib.RRT_TIMEOUT:
                if patience.is_over():
                    return False
            elif status == lib.RRT_E_NOT_FOUND:
                # Another thread has taken it, or is just about to say so.
                with self._lock:
                    return True
            else:
                raise_for(status, error)
                return True
        return True

    def _take(self) -> T:
        with self._lock:
            live = self._live
            if self._outcome is None:
                assert live is not None
                try:
                    handle = open_handle(
                        "rrt_result",
                        lib.rrt_job_take,
                        lib.rrt_result_free,
                        live.runtime,
                        live.number,
                        parent=live.runtime,
                    )
                    self._outcome = (self._read(handle), None)
                except errors.Error as error:
                    self._outcome = (None, error)
                self._forget.detach()
                self._live = None
        if live is not None:
            # A job that was taken has no events any more, also not those that nobody has seen yet.
            live.events.end(live.number)
        value, failure = self._outcome
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Chunk:
    """New tokens of an answer, from :meth:`SampleStream.__iter__`."""

    prompt: int
    sample: int
    """Among those drawn for the prompt; with ``best_of`` these are more than are returned in the end"""
    first: int
    """Place of the first new token in the answer"""
    ids: np.ndarray
    """uint32"""
    logprobs: np.ndarray
    """float32; as in :class:`Sample`"""
    model_logprobs: np.ndarray
    """float32"""
    text: str
    """What is certain by now and was not given before: whole characters, nothing that may turn out to belong to a stop
    string"""
    finish: str | None
    """With the last chunk of an answer how it ended"""


class News:
    """The events of a job that streams, until somebody reads them."""

    def __init__(self) -> None:
        self._events: collections.deque[Event] = collections.deque()
        self.wake: Callable[[], None] | None = None

    def add(self, event: Event) -> None:
        self._events.append(event)
        wake = self.wake
        if wake is not None:
            wake()

    def next(self) -> Event | None:
        """The oldest one; the last one stays."""
        if not self._events:
            return None
        return self._events[0] if self._events[0].last else self._events.popleft()


class SampleStream(Job[Samples]):
    """A sampling job whose tokens can be read as they are sampled: ``for chunk in stream`` or ``async for``.

    Chunks of all answers come as they are ready. :meth:`result` has the whole, and ends the stream. One reader at a
    time.
    """

    def __init__(self, live: Live, read: Callable[[Handle], Samples], news: News, drawn: int) -> None:
        super().__init__(live, read)
        self._news = news
        self._drawn = drawn
        self._text: dict[int, int] = {}

    def __iter__(self) -> Iterator[Chunk]:
        while (live := self._live) is not None:
            event = self._news.next()
            if event is not None:
                chunk = None if event.last else self._chunk(live, event)
                if chunk is None:
                    return
                yield chunk
                continue
            if live.events.fd is None:
                time.sleep(0.001)
            else:
                # Another thread may have taken the events meanwhile, so not for long.
                _wait_readable(live.events.fd, 0.02)
            live.events.drain()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        live, loop = self._live, asyncio.get_running_loop()
        if live is None:
            return
        if live.events.fd is None:
            raise errors.Unsupported("this system has no event descriptor: iterate in a thread")
        news = asyncio.Event()

        def wake() -> None:
            # Another thread may tell it to a loop that has closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.set)

        self._news.wake = wake
        try:
            with live.events.in_loop(loop):
                while self._live is not None:
                    event = self._news.next()
                    if event is None:
                        await news.wait()
                        news.clear()
                        continue
                    chunk = None if event.last else self._chunk(live, event)
                    if chunk is None:
                        return
                    yield chunk
        finally:
            self._news.wake = None

    def _chunk(self, live: Live, event: Event) -> Chunk | None:
        """The tokens of an event; None if another thread has taken the result, which ends the stream."""
        ids = np.empty(event.count, np.uint32)
        model, drawn = np.empty(event.count, np.float32), np.empty(event.count, np.float32)
        count = ffi.new("size_t *")
        arrays = (
            ffi.from_buffer("uint32_t[]", ids),
            ffi.from_buffer("float[]", model),
            ffi.from_buffer("float[]", drawn),
        )
        job = (live.runtime, live.number, event.sequence)
        known = self._text.get(event.sequence, 0)
        text = ffi.new("char[]", max(1, event.text_len - known))
        try:
            call(lib.rrt_job_peek, *job, event.first, *arrays, event.count, count)
            call(lib.rrt_job_peek_text, *job, known, text, event.text_len - known, count)
        except errors.NotFound:
            return None
        self._text[event.sequence] = known + count[0]
        prompt, sample = divmod(event.sequence, self._drawn)
        return Chunk(
            prompt,
            sample,
            event.first,
            ids,
            drawn,
            model,
            ffi.buffer(text, count[0])[:].decode("utf-8"),
            FINISH.get(event.finish),
        )


def _wait_readable(fd: int, seconds: float) -> None:
    # select.select takes no descriptor beyond 1,023.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(int(seconds * 1000))


def _drop(events: Events, number: int) -> None:
    # In a child of fork() a lock may be held for ever, by a thread that is not there.
    if events.process != os.getpid():
        return
    lib.rrt_job_drop(events.runtime.pointer, number, ffi.NULL)
    events.end(number)


def submit(
    function: Callable[..., int],
    owner: Handle,
    request: Any,
    *,
    model: Handle,
    events: Events,
    news: News | None = None,
) -> Live:
    """Queues a request by a function of ``owner`` whose last parameters are the job's number and an error.

    With ``news`` the job is followed before any of its events can be taken.
    """
    number = ffi.new("uint64_t *")
    with events.lock if news is not None else contextlib.nullcontext():
        call(function, owner, request.struct, number)
        if news is not None:
            events.follow(number[0], news.add)
    return Live(events.runtime, (model, *request.handles), events, number[0])
