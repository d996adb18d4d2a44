"""LoRA adapters."""

from __future__ import annotations

import os

from . import errors
from ._arrays import Bytes
from ._handle import Handle, call
from ._native import lib
from .update import InFlight, update_options


class Adapter:
    """A LoRA adapter of a model, from :meth:`Model.load_adapter`; requests name it as ``adapter``."""

    def __init__(self, handle: Handle) -> None:
        self._handle: Handle | None = handle

    def replace(self, path: str | os.PathLike[str], version: int) -> None:
        """Puts other values in its place: requests from now on use them, those before end with what they began with."""
        folder = Bytes(os.fspath(path))
        call(lib.rrt_adapter_replace, self._open(), folder.pointer, folder.length, version)

    def merge(self, version: int, *, in_flight: InFlight = "wait", timeout: float | None = None) -> None:
        """Adds it into the model's weights, rounded to their dtype, as an update to ``version``."""
        options = update_options(in_flight=in_flight, timeout=timeout)
        call(lib.rrt_adapter_merge, self._open(), options, version)

    def unmerge(self, version: int, *, in_flight: InFlight = "wait", timeout: float | None = None) -> None:
        """Puts the weights back to the bit. :class:`Conflict` if they have changed since."""
        options = update_options(in_flight=in_flight, timeout=timeout)
        call(lib.rrt_adapter_unmerge, self._open(), options, version)

    def close(self) -> None:
        """Frees it; jobs that use it keep what they need, a merged one stays merged."""
        self._handle = None

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the adapter is closed")
        return self._handle
