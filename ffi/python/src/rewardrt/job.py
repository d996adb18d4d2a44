"""Work under way."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from . import errors
from ._handle import Handle, call, nanoseconds, open_handle, raise_for
from ._native import ffi, lib

T = TypeVar("T")

# The longest that Python's signal handlers have to wait for a call to come back.
_SLICE_SECONDS = 0.1


class Job(Generic[T]):
    """Something the engine computes meanwhile: wait with :meth:`result`, or ``await`` it.

    It keeps its model until it is done. A job that nobody refers to any more is cancelled.
    """

    def __init__(self, runtime: Handle, model: Handle, number: int, read: Callable[[Handle], T]) -> None:
        self._runtime = runtime
        self._model: Handle | None = model
        self._number = number
        self._read = read
        self._lock = threading.Lock()
        self._outcome: tuple[T | None, errors.Error | None] | None = None
        self._forget = weakref.finalize(self, _forget, runtime, number)
        self._forget.atexit = False

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return self._outcome is not None or self._wait(0.0)

    def result(self, timeout: float | None = None) -> T:
        """Waits, at most ``timeout`` seconds, and returns the result or raises what the job failed with.

        The GIL is released while it waits. :class:`Timeout` if the job is not done; it goes on, and may be waited for again.
        A cancelled sampling job returns the tokens it got.
        """
        if not self._wait(timeout):
            raise errors.Timeout(f"the job was not done within {timeout} seconds", "RRT_TIMEOUT", lib.RRT_TIMEOUT)
        return self._take()

    def cancel(self) -> None:
        """Asks the job to stop, which it does within one step. Nothing happens if it is done."""
        try:
            call(lib.rrt_job_cancel, self._runtime.pointer, self._number)
        except errors.NotFound:
            pass  # its result was taken

    def close(self) -> None:
        """Lets its model go: a job that is not done then fails with :class:`Cancelled`."""
        self._model = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._wait, None)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._take()

    def _wait(self, timeout: float | None) -> bool:
        end = None if timeout is None else time.monotonic() + nanoseconds(timeout) / 1e9
        numbers = ffi.new("uint64_t[1]", [self._number])
        error = ffi.new("rrt_error *")
        while self._outcome is None:
            left = _SLICE_SECONDS if end is None else min(max(end - time.monotonic(), 0.0), _SLICE_SECONDS)
            status = lib.rrt_wait(self._runtime.pointer, numbers, 1, lib.RRT_WAIT_ALL, nanoseconds(left), error)
            if status == lib.RRT_TIMEOUT:
                if end is not None and time.monotonic() >= end:
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
            if self._outcome is None:
                try:
                    handle = open_handle("rrt_result", lib.rrt_job_take, lib.rrt_result_free, self._runtime.pointer,
                                         self._number, parent=self._runtime)
                    self._outcome = (self._read(handle), None)
                except errors.Error as error:
                    self._outcome = (None, error)
                self._forget.detach()
                self._model = None
        value, error = self._outcome
        if error is not None:
            raise error
        return value  # type: ignore[return-value]


def _forget(runtime: Handle, number: int) -> None:
    """What becomes of a job that nobody will ask about: it is cancelled, and its result freed if there is one."""
    out = ffi.new("rrt_result **")
    if lib.rrt_job_take(runtime.pointer, number, out, ffi.NULL) == lib.RRT_OK:
        lib.rrt_result_free(out[0])
    else:
        lib.rrt_job_cancel(runtime.pointer, number, ffi.NULL)
