"""Devices and the runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from . import errors
from ._arrays import Bytes
from ._handle import Children, Handle, call, filled, nanoseconds, runtime_handle, struct
from ._native import ffi, lib
from .events import Events
from .model import InFlight, Model, in_flight_mode, load_model
from .stats import Memory, Timing, numbers_of

_TYPES = {
    lib.RRT_DEVICE_CPU: "cpu",
    lib.RRT_DEVICE_DISCRETE: "discrete",
    lib.RRT_DEVICE_INTEGRATED: "integrated",
    lib.RRT_DEVICE_VIRTUAL: "virtual",
    lib.RRT_DEVICE_SOFTWARE: "software",
    lib.RRT_DEVICE_OTHER: "other",
}
_STATES = {
    lib.RRT_STATE_RUNNING: "running",
    lib.RRT_STATE_PAUSED: "paused",
    lib.RRT_STATE_LOST: "lost",
    lib.RRT_STATE_POISONED: "poisoned",
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
    size = ffi.sizeof("rrt_device_info")

    def write(found: Any, capacity: int, need: Any) -> None:
        for info in found:
            info.struct_size = size
        call(lib.rrt_list_devices, found, capacity, size, need)

    bytes_of_all = filled("rrt_device_info", 16, write)
    return [
        Device(
            name=ffi.string(info.name).decode(),
            type=_TYPES[info.type],
            driver=ffi.string(info.driver).decode(),
            max_binding_bytes=info.max_binding_bytes,
            has_f16=bool(info.has_f16),
            has_subgroups=bool(info.has_subgroups),
        )
        for info in ffi.from_buffer("rrt_device_info[]", bytes_of_all)
    ]


class Runtime:
    """An engine on one device, which the models that are loaded on it share.

    ``device`` is "auto" (a real GPU if there is one, else the CPU), "cpu", "gpu", or "gpu:PART" of an adapter's name.
    ``threads`` is for the CPU; 0 is one a core. Any thread may use it, and all that comes from it, at any time. Not
    after a fork: open a runtime in each process.

    ``max_jobs`` may wait or run at a time (0: 65,536), and may come to ``max_queued_tokens`` (0: 2^26); more are
    :class:`Full`. ``shader_cache`` is a folder that keeps a GPU's compiled shaders.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        threads: int = 0,
        max_jobs: int = 0,
        max_queued_tokens: int = 0,
        shader_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        name = Bytes(device)
        options = struct(
            "rrt_open_opts",
            device=name.pointer,
            device_len=name.length,
            threads=threads,
            max_jobs=max_jobs,
            max_queued_tokens=max_queued_tokens,
        )
        if shader_cache is not None:
            folder = Bytes(os.fspath(shader_cache))
            options.shader_cache, options.shader_cache_len = folder.pointer, folder.length
        self._handle: Handle | None = runtime_handle(options)
        self._events: Events | None = Events(self._handle)
        self._models = Children()

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
        steps_at_once: int = 0,
        version: int = 0,
        mmap: bool = True,
    ) -> Model:
        """Loads a folder with config.json, safetensors, and tokenizer.json if there is one. The GIL is released
        meanwhile.

        - ``precision``: "f32" rounds nothing; "auto" may round the inputs of products to the weights' 16-bit type.
        - ``weights``: "int8" and "int4" quantise the weights of products.
        - ``max_batch_tokens``: rows of a step; 0 is 1,024. Results do not depend on it.
        - ``kv_tokens``: positions in the KV cache; 0 is up to 32,768, as memory allows.
        - ``memory``: bytes that the model may allocate; 0 is no bound. More are :class:`LimitError`.
        - ``max_context``: the longest sequence; 0 is what config.json says.
        - ``steps_at_once``: decode steps between two looks at streams, cancels and new jobs; 0 is 8 on a GPU, 1 on the
          CPU. Results do not depend on it.
        - ``version``: of the weights, as results carry it.
        - ``mmap``: False reads the files instead of mapping them.
        """
        handle, events = self._open(), self._events
        if events is None:
            raise errors.Closed("the runtime is closed")
        model = load_model(
            handle,
            path,
            events=events,
            precision=precision,
            weights=weights,
            version=version,
            mmap=mmap,
            max_batch_tokens=max_batch_tokens,
            kv_tokens=kv_tokens,
            memory=memory,
            max_context=max_context,
            steps_at_once=steps_at_once,
        )
        return self._models.add(model)

    def pause(self, in_flight: InFlight = "wait", timeout: float | None = None) -> None:
        """Stops every model between two steps, until :meth:`resume`. Jobs may be submitted, and wait.

        What becomes of the sequences under way: they finish ("wait"), end with what they have ("cancel"), or go on at
        :meth:`resume` ("keep"). :class:`Timeout` or :class:`Busy` if they do not come to rest; everything goes on then.
        """
        call(lib.rrt_pause, self._open(), in_flight_mode(in_flight), nanoseconds(timeout))

    def resume(self) -> None:
        """Ends a pause."""
        call(lib.rrt_resume, self._open())

    @property
    def device(self) -> str:
        """What it runs on, for people."""
        handle = self._open()
        return bytes(filled("char", 128, lambda *out: call(lib.rrt_runtime_device, handle, *out))).decode()

    @property
    def state(self) -> str:
        """ "running", "paused", "lost" (the device is: close the runtime and open another) or "poisoned" (a bug)."""
        state = ffi.new("int32_t *")
        call(lib.rrt_runtime_state, self._open(), state)
        return _STATES[state[0]]

    def memory(self) -> Memory:
        """Bytes that its models hold now."""
        return numbers_of(Memory, "rrt_memory", lib.rrt_memory_stats, self._open())

    def timing(self) -> Timing:
        """What was done since it was opened, or since :meth:`reset_stats`, and what is going on."""
        return numbers_of(Timing, "rrt_timing", lib.rrt_timing_stats, self._open())

    def reset_stats(self) -> None:
        """Counts from here, in all models."""
        call(lib.rrt_stats_reset, self._open())

    def trim(self) -> None:
        """Gives the memory of caches back, in models that have nothing to do. Results do not depend on it."""
        call(lib.rrt_trim, self._open())

    def close(self) -> None:
        """Cancels the jobs and closes the models; more calls do nothing. Results that are held stay readable."""
        self._models.close()
        self._handle = self._events = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the runtime is closed")
        return self._handle
