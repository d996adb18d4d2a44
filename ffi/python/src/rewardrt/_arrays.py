"""Arrays in and out of the library without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import errors
from ._native import ffi

_DTYPES = {
    "uint32_t": np.uint32,
    "int32_t": np.int32,
    "uint64_t": np.uint64,
    "float": np.float32,
    "size_t": np.uintp,
    "char": np.uint8,
}


class _Memory:
    """Memory of the library as numpy's array interface; the array's base, so it keeps ``owner`` as long as any view
    lives."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: Any, owner: Any, strides: tuple[int, ...] | None = None
    ):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "strides": strides,
            "typestr": np.dtype(dtype).str,
            "data": (address, True),
        }


def borrowed(pointer: Any, count: int, owner: Any) -> np.ndarray:
    """A read-only array over ``count`` elements at a pointer of the library. It keeps ``owner`` alive."""
    dtype = _DTYPES[ffi.typeof(pointer).item.cname]
    if count == 0 or pointer == ffi.NULL:
        return np.empty(0, dtype)
    return np.asarray(_Memory(int(ffi.cast("uintptr_t", pointer)), (count,), dtype, owner))


def at_address(
    address: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, owner: Any
) -> np.ndarray:
    """A read-only array over foreign memory; strides in bytes, None for row-major without gaps."""
    return np.asarray(_Memory(address, shape, dtype, owner, strides))


def token_ids(value: Any, what: str) -> np.ndarray:
    """Token ids as a contiguous uint32 array [tokens]."""
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise errors.ArgumentError(f"{what} must be a sequence of token ids, it is {value!r:.60}")
    if array.dtype != np.uint32:
        if array.size and not (0 <= int(array.min()) and int(array.max()) < 2**32):
            raise errors.ArgumentError(
                f"{what} has ids from {array.min()} to {array.max()}, they must be below 2^32 and not negative"
            )
        array = array.astype(np.uint32)
    return np.ascontiguousarray(array)


def numbers(values: Any, dtype: Any, what: str, count: int | None = None) -> np.ndarray:
    """Whole numbers from 0 as an array of ``dtype``, ``count`` of them if that is given."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu") or (array.size and int(array.min()) < 0):
        raise errors.ArgumentError(f"{what} must be a sequence of whole numbers from 0, it is {values!r:.60}")
    if count is not None and array.size != count:
        raise errors.ArgumentError(
            f"{what} has {array.size} elements, it must have one for each of the {count} sequences"
        )
    return np.ascontiguousarray(array, dtype)


class Packed:
    """Sequences side by side, as the library takes them: ids [tokens] and offsets [count + 1]."""

    def __init__(self, sequences: Sequence[np.ndarray]) -> None:
        self.count = len(sequences)
        self.offsets = np.zeros(self.count + 1, np.uintp)
        np.cumsum([len(s) for s in sequences], out=self.offsets[1:])
        self.ids = np.concatenate(sequences) if sequences else np.empty(0, np.uint32)

    def write(self, target: Any) -> None:
        """Fills an rrt_sequences that must not outlive this object."""
        target.ids = pointer("uint32_t", self.ids)
        target.offsets = pointer("size_t", self.offsets)
        target.count = self.count


def pointer(c_type: str, array: np.ndarray) -> Any:
    """A pointer to a contiguous array that the caller keeps alive."""
    return ffi.cast(f"{c_type} *", array.ctypes.data)


class Bytes:
    """UTF-8 of a string, with its pointer."""

    __slots__ = ("data", "length", "pointer")

    def __init__(self, text: str) -> None:
        self.data = text.encode("utf-8", "surrogateescape")
        self.pointer = ffi.from_buffer(self.data)
        self.length = len(self.data)


class Strings:
    """A list of strings: one text, and offsets [count + 1] into its bytes."""

    def __init__(self, strings: Sequence[str]) -> None:
        parts = [s.encode() for s in strings]
        self.count = len(parts)
        self.offsets = np.zeros(self.count + 1, np.uintp)
        np.cumsum([len(part) for part in parts], out=self.offsets[1:])
        self.data = b"".join(parts)
        self.pointer = ffi.from_buffer(self.data)
