"""What jobs tell while they run, for those who wait without a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import errors
from ._handle import Handle, call
from ._native import ffi, lib

_AT_ONCE = 256


@dataclass(frozen=True)
class Event:
    """A job has news (a CHUNK, of a job that streams), or has come to its end."""

    last: bool
    sequence: int
    first: int
    count: int
    finish: int
    text_len: int


class Events:
    """The events of a runtime, each handed to whoever follows its job.

    The library gives every event once. So whoever is told that some wait takes them all, and calls the followers of
    other jobs for theirs. A follower that comes after a job's last event looks at the job itself: the order is to
    follow first and look then.
    """

    def __init__(self, runtime: Handle) -> None:
        self.runtime = runtime
        self.process = os.getpid()
        # A job's finalizer may run inside of it.
        self.lock = threading.RLock()
        self._followers: dict[int, list[Callable[[Event], None]]] = {}
        self._loops: dict[asyncio.AbstractEventLoop, int] = {}
        self._buffer = ffi.new("rrt_event[]", _AT_ONCE)
        self._fd: int | None = None

    @property
    def fd(self) -> int | None:
        """A descriptor that is readable while events wait; None where there is no such thing."""
        if self._fd is None:
            found = ffi.new("int32_t *")
            try:
                call(lib.rrt_event_fd, self.runtime, found)
            except errors.Unsupported:
                return None
            self._fd = found[0]
        return self._fd

    def drain(self) -> None:
        """Takes all events there are and calls their followers. Any thread may call it."""
        count = ffi.new("size_t *")
        size = ffi.sizeof("rrt_event")
        while True:
            with self.lock:
                call(lib.rrt_poll, self.runtime, self._buffer, _AT_ONCE, size, count)
                found = [(e.job, _event(e)) for e in self._buffer[0 : count[0]]]
                told = [(f, event) for job, event in found for f in self._followers.get(job, ())]
                for job, event in found:
                    if event.last:
                        self._followers.pop(job, None)
            for follower, event in told:
                follower(event)
            if len(found) < _AT_ONCE:
                return

    def follow(self, job: int, follower: Callable[[Event], None]) -> None:
        """Calls ``follower`` with the job's events, from whichever thread takes them, until the last one. Needs the
        lock."""
        self._followers.setdefault(job, []).append(follower)

    @contextlib.contextmanager
    def following(self, job: int, follower: Callable[[Event], None]) -> Iterator[None]:
        """The same for the time of a block."""
        with self.lock:
            self.follow(job, follower)
        try:
            yield
        finally:
            with self.lock:
                followers = self._followers.get(job, [])
                if follower in followers:
                    followers.remove(follower)
                if not followers:
                    self._followers.pop(job, None)

    def end(self, job: int) -> None:
        """Tells the followers of a job that was taken or dropped, which has no events any more."""
        with self.lock:
            followers = self._followers.pop(job, [])
        for follower in followers:
            follower(_GONE)

    @contextlib.contextmanager
    def in_loop(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Has an event loop take the events for the time of a block inside it."""
        fd = self.fd
        assert fd is not None
        if self._loops.get(loop, 0) == 0:
            loop.add_reader(fd, self.drain)
        self._loops[loop] = self._loops.get(loop, 0) + 1
        try:
            yield
        finally:
            self._loops[loop] -= 1
            if self._loops[loop] == 0:
                del self._loops[loop]
                loop.remove_reader(fd)


def _event(e: Any) -> Event:
    return Event(e.kind != lib.RRT_EVENT_CHUNK, e.sequence, e.first, e.count, e.finish, e.text_len)


_GONE = Event(True, 0, 0, 0, -1, 0)
