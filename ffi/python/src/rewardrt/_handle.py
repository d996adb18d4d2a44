"""Calls into the library, and the handles that it gave out.

A handle is freed when the last reference to its :class:`Handle` goes. Whoever uses one holds a reference for the time
of the call, and what came out of a handle holds its parent, so the library's rules on the order of freeing, and on not
freeing what another thread uses, follow from counting references. ``close()`` of a public object is no more than
letting its reference go.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from . import errors
from ._native import ffi, lib

T = TypeVar("T")

UNLIMITED = 2**64 - 1

# cffi releases the GIL for the time of every call into the library.


def raise_for(status: int, error: Any) -> None:
    """Raises the exception of a status that is not RRT_OK."""
    if status != lib.RRT_OK:
        name = ffi.string(lib.rrt_status_name(status)).decode()
        text = ffi.buffer(error.text, error.len)[:].decode("utf-8", "replace")
        raise errors.of_status(name, status, text)


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Calls a function whose last parameter is an rrt_error, and raises what it says.

    A :class:`Handle` among the arguments is passed as its pointer, and held until the call is over: another thread's
    ``close()`` must not free it meanwhile.
    """
    error = ffi.new("rrt_error *")
    raise_for(function(*(a.pointer if isinstance(a, Handle) else a for a in arguments), error), error)


def struct(name: str, /, **fields: Any) -> Any:
    """An input struct of the library with its defaults and these fields."""
    value = ffi.new(f"{name} *")
    getattr(lib, f"{name}_init")(value)
    for field, given in fields.items():
        setattr(value, field, given)
    return value


def view(name: str) -> Any:
    """An output struct of the library, ready to be filled."""
    value = ffi.new(f"{name} *")
    value.struct_size = ffi.sizeof(name)
    return value


def nanoseconds(timeout: float | None) -> int:
    """A time limit in seconds as the library takes it; None is no limit."""
    if timeout is None:
        return UNLIMITED
    if not timeout >= 0:
        raise errors.ArgumentError(f"timeout is {timeout}, it must be at least 0 seconds, or None for no limit")
    return min(int(timeout * 1e9), UNLIMITED - 1)


class Patience:
    """A time limit that is spent in short calls: Python's signal handlers run between them, and what was closed
    meanwhile is noticed."""

    _SLICE_SECONDS = 0.1

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + nanoseconds(timeout) / 1e9

    def slice(self) -> int:
        """Nanoseconds of the next call."""
        if self._end is None:
            return nanoseconds(self._SLICE_SECONDS)
        return nanoseconds(min(max(self._end - time.monotonic(), 0.0), self._SLICE_SECONDS))

    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


def filled(c_type: str, guess: int, write: Callable[[Any, int, Any], None]) -> Any:
    """The bytes of what ``write(buffer, capacity, need)`` gives: with a guessed capacity, then with the one that it
    asks for."""
    need, capacity = ffi.new("size_t *"), guess
    while True:
        target = ffi.new(f"{c_type}[]", max(capacity, 1))
        try:
            write(target, capacity, need)
        except errors.Error as error:
            if error.status != "RRT_E_SHORT_BUFFER":
                raise
            capacity = need[0]
        else:
            return ffi.buffer(target, need[0] * ffi.sizeof(c_type))


class Handle:
    """A pointer of the library, freed once, by whoever drops the last reference."""

    __slots__ = ("__weakref__", "parent", "pointer")

    def __init__(self, pointer: Any, free: Callable[[Any], Any], parent: Handle | None = None) -> None:
        self.pointer = pointer
        self.parent = parent
        # The finalizer's arguments hold the parent, so that it outlives this handle in reference cycles too. Nothing is
        # freed at exit: other threads may still be in a call (see _rest).
        weakref.finalize(self, _free, free, pointer, parent, os.getpid()).atexit = False


def _free(free: Callable[[Any], Any], pointer: Any, parent: Handle | None, process: int) -> None:
    # A child of fork() has the parent's handles, but not the threads behind them.
    if process == os.getpid():
        free(pointer)


class Children:
    """What is closed with its owner. Any thread may add to it while another one closes it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False

    def add(self, child: T) -> T:
        with self._lock:
            if not self._closed:
                self._alive.add(child)
                return child
        child.close()  # type: ignore[attr-defined]
        raise errors.Closed("it was closed meanwhile, by another thread")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            children = list(self._alive)
        for child in children:
            child.close()


def open_handle(
    out_type: str,
    function: Callable[..., int],
    free: Callable[[Any], Any],
    *arguments: Any,
    parent: Handle | None = None,
) -> Handle:
    """Calls ``function(*arguments, out, err)`` and takes over what it put into ``out``."""
    out = ffi.new(f"{out_type} **")
    call(function, *arguments, out)
    return Handle(out[0], free, parent)


def runtime_handle(options: Any) -> Handle:
    handle = open_handle("rrt_runtime", lib.rrt_open, _close, options)
    with _OPEN_LOCK:
        _OPEN.add(handle)
    return handle


def _close(pointer: Any) -> None:
    # Nothing that could be BUSY is left: all of it holds the handle that this frees.
    lib.rrt_close(pointer, UNLIMITED, ffi.NULL)


_OPEN: weakref.WeakSet[Handle] = weakref.WeakSet()
_OPEN_LOCK = threading.Lock()
_PROCESS = os.getpid()


@atexit.register
def _rest() -> None:
    """Brings the engines to rest before the process goes; their threads sleep from then on, and nothing is freed."""
    if os.getpid() != _PROCESS:
        return
    with _OPEN_LOCK:
        handles = list(_OPEN)
    for handle in handles:
        lib.rrt_pause(handle.pointer, lib.RRT_IN_FLIGHT_CANCEL, 5_000_000_000, ffi.NULL)
