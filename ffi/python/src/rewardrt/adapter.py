"""LoRA adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from . import errors
from ._arrays import Bytes
from ._handle import Children, Handle, call, open_handle
from ._native import lib
from .update import InFlight, Require, Update, update_options


def config_text(config: Any) -> str:
    """The text of adapter_config.json: as it is, from a mapping, or from a ``peft.LoraConfig``."""
    if isinstance(config, str):
        return config
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        kind = type(config).__name__
        raise errors.ArgumentError(f"config is a {kind}, it must be JSON, a mapping or a peft.LoraConfig")

    def plain(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        raise errors.ArgumentError(f"config has a {type(value).__name__}, which JSON has not")

    try:
        return json.dumps(dict(fields), default=plain)
    except (TypeError, ValueError) as error:
        raise errors.ArgumentError(f"config is no JSON: {error}") from error


class Adapter:
    """A LoRA adapter of a model, from :meth:`Model.load_adapter` or :meth:`Model.adapter_from_config`; requests name it as
    ``adapter``."""

    def __init__(self, handle: Handle) -> None:
        self._handle: Handle | None = handle
        self._children = Children()

    def update(self, version: int, *, require: Require = "all", expect_version: int | None = None) -> Update:
        """Begins a change of its values to ``version``, which leaving the ``with`` block commits, and an exception aborts.

            with adapter.update(version=8) as update:
                update.put_all(peft.get_peft_model_state_dict(policy))

        Tensors have PEFT's names and any of float32, float16 and bfloat16. Requests from the commit on use the new values,
        those before end with what they began with; nothing waits for them. ``require`` and ``expect_version`` as in
        :meth:`Model.update`.
        """
        options = update_options(require=require, expect_version=expect_version)
        handle = self._open()
        begun = open_handle(
            "rrt_update", lib.rrt_adapter_update_begin, lib.rrt_update_free, handle, options, parent=handle.parent
        )
        return self._children.add(Update(begun, 0, version))

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
        """Frees it, with its updates; jobs that use it keep what they need, a merged one stays merged."""
        self._children.close()
        self._handle = None

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the adapter is closed")
        return self._handle
