"""Changes of weights as transactions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from . import errors
from ._arrays import Bytes, numbers, pointer
from ._handle import Handle, call, nanoseconds, struct
from ._native import ffi, lib
from ._tensors import tensor

InFlight = Literal["wait", "cancel", "keep"]
Require = Literal["all", "subset"]

_IN_FLIGHT = {"wait": lib.RRT_IN_FLIGHT_WAIT, "cancel": lib.RRT_IN_FLIGHT_CANCEL, "keep": lib.RRT_IN_FLIGHT_KEEP}
_STORAGE = {"shadow": lib.RRT_STORAGE_SHADOW, "in_place": lib.RRT_STORAGE_IN_PLACE}
_REQUIRE = {"all": lib.RRT_REQUIRE_ALL, "subset": lib.RRT_REQUIRE_SUBSET}


def one_of(table: Mapping[str, int], value: str, what: str) -> int:
    """The number of a word."""
    if value not in table:
        raise errors.ArgumentError(f"{what} is {value!r}, it must be one of {', '.join(map(repr, table))}")
    return table[value]


def in_flight_mode(value: str) -> int:
    return one_of(_IN_FLIGHT, value, "in_flight")


def update_options(
    *,
    storage: str = "shadow",
    in_flight: str = "wait",
    require: str = "all",
    expect_version: int | None = None,
    check_finite: bool = False,
    convert: bool = False,
    timeout: float | None = None,
) -> Any:
    flags = lib.RRT_UPDATE_CHECK_FINITE if check_finite else 0
    flags |= lib.RRT_UPDATE_CONVERT if convert else 0
    flags |= lib.RRT_UPDATE_EXPECT_VERSION if expect_version is not None else 0
    return struct(
        "rrt_update_opts",
        flags=flags,
        expect_version=expect_version or 0,
        storage=one_of(_STORAGE, storage, "storage"),
        in_flight=in_flight_mode(in_flight),
        require=one_of(_REQUIRE, require, "require"),
        timeout_ns=nanoseconds(timeout),
    )


class Update:
    """New weights on their way in, from :meth:`Model.update` or :meth:`Adapter.update`. One thread at a time may use it.

    After an error of a ``put`` nothing of the tensor was taken and the update can go on.
    """

    def __init__(self, handle: Handle, present: int, version: int | None) -> None:
        self._handle: Handle | None = handle
        self._version = version
        self._next = present + 1

    def put(self, name: str, value: Any) -> None:
        """Puts a whole tensor under the checkpoint's own name, also where the library fuses tensors.

        ``value`` is a numpy array, anything with DLPack on the host (bfloat16 torch tensors, for instance), or with the
        buffer protocol. :class:`NotFound` for a name that the model does not have, :class:`ShapeError` for another
        shape or dtype, :class:`Duplicate` if it was put before.
        """
        description, _kept = _described(name, value)
        call(lib.rrt_update_tensor, self._open(), description)

    def put_slice(self, name: str, value: Any, start: Sequence[int]) -> None:
        """Puts a part of a tensor; ``start`` [rank] is its first index in each dimension."""
        description, _kept = _described(name, value)
        first = numbers(start, "uint64", "start", int(description.rank))
        call(lib.rrt_update_slice, self._open(), description, pointer("uint64_t", first))

    def put_all(self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        """Puts every tensor of a state dict, or of pairs of name and tensor."""
        for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
            self.put(name, value)

    def put_files(self, path: str | os.PathLike[str]) -> None:
        """Puts a safetensors file or a checkpoint folder; mapped if the model's own files are, and then not to be changed.
        Of an adapter: a file, or a folder that PEFT saved with the same config; read at once."""
        name = Bytes(os.fspath(path))
        call(lib.rrt_update_file, self._open(), name.pointer, name.length)

    def put_delta(self, path: str | os.PathLike[str]) -> int:
        """Puts a delta folder made for the model's version, and returns the version that it leads to."""
        name, version = Bytes(os.fspath(path)), ffi.new("uint64_t *")
        call(lib.rrt_update_delta, self._open(), name.pointer, name.length, version)
        self._next = version[0]
        return version[0]

    def commit(self, version: int | None = None) -> int:
        """Changes all weights between two steps, and returns the new version; caches of the old ones are gone.

        :class:`ShapeError` lists tensors that are missing. After an error in shadow the old weights serve on and the
        update can go on.
        """
        handle = self._open()
        chosen = next(v for v in (version, self._version, self._next) if v is not None)
        call(lib.rrt_update_commit, handle, chosen)
        self._handle = None
        return chosen

    def abort(self) -> None:
        """Ends it without a change; nothing happens if it has ended."""
        handle, self._handle = self._handle, None
        if handle is not None:
            call(lib.rrt_update_abort, handle)

    def close(self) -> None:
        """As :meth:`abort`, once no other thread is in a call of it."""
        self._handle = None

    def __enter__(self) -> Update:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._handle is not None:
                self.commit()
        finally:
            self.abort()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the update has ended")
        return self._handle


def _described(name: str, value: Any) -> tuple[Any, Any]:
    found, text = tensor(value, name), Bytes(name)
    shape = numbers(found.shape, "uint64", "shape")
    description = struct(
        "rrt_tensor_desc",
        name=text.pointer,
        name_len=text.length,
        dtype=found.dtype,
        rank=len(found.shape),
        shape=pointer("uint64_t", shape),
        data=ffi.cast("void *", found.bits.ctypes.data),
        bytes=found.bits.nbytes,
    )
    return description, (found, text, shape)
