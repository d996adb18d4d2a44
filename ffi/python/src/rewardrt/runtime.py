"""Devices and the runtime."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Literal

from . import errors
from ._arrays import Bytes
from ._handle import Handle, call, nanoseconds, runtime_handle, struct
from ._native import ffi, lib
from .model import InFlight, Model, in_flight_mode, load_model

_TYPES = {
    lib.RRT_DEVICE_CPU: "cpu",
    lib.RRT_DEVICE_DISCRETE: "discrete",
    lib.RRT_DEVICE_INTEGRATED: "integrated",
    lib.RRT_DEVICE_VIRTUAL: "virtual",
    lib.RRT_DEVICE_SOFTWARE: "software",
    lib.RRT_DEVICE_OTHER: "other",
}


@dataclass(frozen=True)
class Device:
    """Something that a runtime can compute on."""

    name: str
    type: str
    """"cpu", "discrete", "integrated", "virtual", "software" or "other\""""
    driver: str
    """The instruction set for the CPU"""
    max_binding_bytes: int
    """0 for the CPU"""
    has_f16: bool
    has_subgroups: bool


def devices() -> list[Device]:
    """The CPU, then the adapters that there are."""
    need = ffi.new("size_t *")
    capacity = 16
    while True:
        found = ffi.new("rrt_device_info[]", capacity)
        size = ffi.sizeof("rrt_device_info")
        for info in found:
            info.struct_size = size
        try:
            call(lib.rrt_list_devices, found, capacity, size, need)
        except errors.Error as error:
            if error.status != "RRT_E_SHORT_BUFFER":
                raise
            capacity = need[0]
            continue
        return [
            Device(
                name=ffi.string(info.name).decode(),
                type=_TYPES[info.type],
                driver=ffi.string(info.driver).decode(),
                max_binding_bytes=info.max_binding_bytes,
                has_f16=bool(info.has_f16),
                has_subgroups=bool(info.has_subgroups),
            )
            for info in found[0 : need[0]]
        ]


class Runtime:
    """An engine on one device, which the models that are loaded on it share.

    ``device`` is "auto" (a real GPU if there is one, else the CPU), "cpu", "gpu", or "gpu:PART" of an adapter's name.
    ``threads`` is for the CPU; 0 is one a core. Any thread may use it, and all that comes from it, at any time. Not after a
    fork: open a runtime in each process.
    """

    def __init__(self, device: str = "auto", *, threads: int = 0) -> None:
        name = Bytes(device)
        self._handle: Handle | None = runtime_handle(
            struct("rrt_open_opts", device=name.pointer, device_len=name.length, threads=threads)
        )
        self._models: weakref.WeakSet[Model] = weakref.WeakSet()

    def load_model(
        self,
        path: str | os.PathLike[str],
        *,
        precision: Literal["auto", "f32"] = "auto",
        weights: Literal["stored", "int8", "int4"] = "stored",
        max_batch_tokens: int = 0,
        kv_tokens: int = 0,
        memory: int = 0,
        max_context: int = 0,
        version: int = 0,
        mmap: bool = True,
    ) -> Model:
        """Loads a folder with config.json, safetensors, and tokenizer.json if there is one. The GIL is released meanwhile.

        - ``precision``: "f32" rounds nothing; "auto" may round the inputs of products to the weights' 16-bit type.
        - ``weights``: "int8" and "int4" quantise the weights of products.
        - ``max_batch_tokens``: rows of a step; 0 is 1,024. Results do not depend on it.
        - ``kv_tokens``: positions in the KV cache; 0 is up to 32,768, as memory allows.
        - ``memory``: bytes that the model may allocate; 0 is no bound. More are :class:`LimitError`.
        - ``max_context``: the longest sequence; 0 is what config.json says.
        - ``version``: of the weights, as results carry it.
        - ``mmap``: False reads the files instead of mapping them.
        """
        model = load_model(
            self._open(), path, precision=precision, weights=weights, max_batch_tokens=max_batch_tokens,
            kv_tokens=kv_tokens, memory=memory, max_context=max_context, version=version, mmap=mmap,
        )  # fmt: skip
        self._models.add(model)
        return model

    def pause(self, in_flight: InFlight = "wait", timeout: float | None = None) -> None:
        """Stops every model between two steps, until :meth:`resume`. Jobs may be submitted, and wait.

        What becomes of the sequences under way: they finish ("wait"), end with what they have ("cancel"), or go on at
        :meth:`resume` ("keep"). :class:`Timeout` or :class:`Busy` if they do not come to rest; everything goes on then.
        """
        call(lib.rrt_pause, self._open().pointer, in_flight_mode(in_flight), nanoseconds(timeout))

    def resume(self) -> None:
        """Ends a pause."""
        call(lib.rrt_resume, self._open().pointer)

    def close(self) -> None:
        """Cancels the jobs and closes the models; more calls do nothing. Results that are held stay readable."""
        for model in list(self._models):
            model.close()
        self._handle = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the runtime is closed")
        return self._handle
