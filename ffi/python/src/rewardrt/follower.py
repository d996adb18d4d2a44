"""Models that follow a folder of weights."""

from __future__ import annotations

from . import errors
from ._handle import Handle, Patience, call
from ._native import ffi, lib


class Follower:
    """Keeps a model at the newest weights of a folder, from :meth:`Model.follow`, until it is closed."""

    def __init__(self, handle: Handle) -> None:
        self._handle: Handle | None = handle

    def wait(self, version: int, timeout: float | None = None) -> None:
        """Waits until the model has this version or a later one; :class:`Timeout` if it does not in time,
        :class:`Closed` if another thread closes it meanwhile."""
        patience = Patience(timeout)
        while True:
            try:
                return call(lib.rrt_follower_wait, self._open(), version, patience.slice())
            except errors.Timeout:
                if patience.is_over():
                    raise

    @property
    def updates(self) -> int:
        """Updates made so far. Raises what went wrong when the folder was last looked at."""
        count = ffi.new("uint64_t *")
        call(lib.rrt_follower_state, self._open(), count)
        return count[0]

    def close(self) -> None:
        """Stops looking."""
        self._handle = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the follower is closed")
        return self._handle
