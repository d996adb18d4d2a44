"""Tensors of other libraries as bytes with a dtype and a shape.

numpy arrays, whatever speaks DLPack (torch, JAX, CuPy on the host, …), and the buffer protocol. No such library is
imported: DLPack's struct is read where it lies, which is also how bfloat16 comes in, that numpy has no name for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import errors
from ._arrays import at_address
from ._native import lib

_NUMPY = {"float32": lib.RRT_DTYPE_F32, "float16": lib.RRT_DTYPE_F16, "bfloat16": lib.RRT_DTYPE_BF16}
_NAMES = {lib.RRT_DTYPE_F32: "float32", lib.RRT_DTYPE_F16: "float16", lib.RRT_DTYPE_BF16: "bfloat16"}


def dtype_name(dtype: int) -> str:
    """The name of an RRT_DTYPE_…"""
    return _NAMES[dtype]


@dataclass(frozen=True)
class Tensor:
    """A tensor on the host, row-major without gaps. ``bits`` holds its bytes and whatever keeps them alive."""

    dtype: int
    shape: tuple[int, ...]
    bits: np.ndarray


def tensor(value: Any, name: str) -> Tensor:
    """Takes a tensor of any of the kinds above; copies only where it is not row-major without gaps."""
    if isinstance(value, Tensor):
        return value
    # torch exports no tensor that is part of a graph.
    if getattr(value, "requires_grad", False):
        value = value.detach()
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        return _from_dlpack(value, name)
    array = np.asarray(value)
    dtype = _NUMPY.get(array.dtype.name)
    if dtype is None:
        raise errors.ShapeError(f"{name}: dtype {array.dtype.name}, it must be float32, float16 or bfloat16")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Tensor(dtype, array.shape, np.ascontiguousarray(array))


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, the beginning of an unversioned DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL: row-major without gaps
        ("byte_offset", ctypes.c_uint64),
    ]


# DLDevice types whose memory the host reads: kDLCPU, kDLCUDAHost, kDLROCMHost.
_HOST = (1, 3, 11)
# (DLDataTypeCode, bits) → dtype, and a numpy dtype of the same size.
_DLPACK = {
    (2, 32): (lib.RRT_DTYPE_F32, np.float32),
    (2, 16): (lib.RRT_DTYPE_F16, np.uint16),
    (4, 16): (lib.RRT_DTYPE_BF16, np.uint16),
}

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _from_dlpack(value: Any, name: str) -> Tensor:
    device = value.__dlpack_device__()[0]
    if int(device) not in _HOST:
        raise errors.ArgumentError(
            f"{name}: on a device of DLPack type {int(device)}, bring it to the host first (`.cpu()`)"
        )
    # The capsule keeps its name, so its destructor gives the tensor back when it goes.
    capsule = value.__dlpack__()
    found = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    kind = (found.dtype.code, found.dtype.bits)
    if kind not in _DLPACK or found.dtype.lanes != 1:
        raise errors.ShapeError(f"{name}: DLPack dtype {kind}, it must be float32, float16 or bfloat16")
    dtype, same_size = _DLPACK[kind]
    shape = tuple(found.shape[i] for i in range(found.ndim))
    if 0 in shape:
        return Tensor(dtype, shape, np.empty(0, same_size))
    strides = None
    if found.strides:
        strides = tuple(found.strides[i] * (found.dtype.bits // 8) for i in range(found.ndim))
    array = at_address((found.data or 0) + found.byte_offset, shape, same_size, strides, (capsule, value))
    return Tensor(dtype, shape, np.ascontiguousarray(array))
