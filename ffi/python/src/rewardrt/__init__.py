"""rewardrt: sampling and reward scoring for online RLHF, inside your own process.

    import rewardrt

    with rewardrt.Runtime() as runtime:
        model = runtime.load_model("path/to/model")
        samples = model.sample("The capital of France is", n=4, max_tokens=16, seed=1).result()
        print(samples.texts, samples[0].logprobs)

- :class:`Runtime`: an engine on a device; :func:`devices` lists them.
- :class:`Model`: ``sample``, ``logprobs``, ``score``, ``update``, ``load_adapter``.
- :class:`Job`: ``result()``, ``cancel()``, or ``await`` it.
- :class:`Samples`, :class:`Logprobs`, :class:`Scores`: numpy arrays over the library's memory, without copies.
- :class:`Update`: new weights as a transaction. :class:`Adapter`: LoRA. :class:`Tokenizer`.
- :class:`Error` and its subclasses: what the library refuses, with the name and number of its status.

The same tokens, weights, parameters and seed give the same bits, whatever else is computed at the time.
"""

from ._native import ffi as _ffi
from ._native import lib as _lib
from .adapter import Adapter
from .errors import (
    ArgumentError,
    Busy,
    Cancelled,
    Closed,
    Conflict,
    DeviceLost,
    Duplicate,
    Error,
    Forked,
    FormatError,
    Full,
    LimitError,
    NoDevice,
    NonFinite,
    NotFound,
    OutOfMemory,
    ShapeError,
    TemplateError,
    Timeout,
    Unsupported,
)
from .job import Job
from .model import Model, ModelInfo, TensorInfo
from .results import Logprobs, Sample, Samples, Scores
from .runtime import Device, Runtime, devices
from .tokenizer import Tokenizer
from .update import Update

__version__ = _ffi.string(_lib.rrt_version()).decode().split()[-1]

__all__ = [
    "Adapter",
    "ArgumentError",
    "Busy",
    "Cancelled",
    "Closed",
    "Conflict",
    "Device",
    "DeviceLost",
    "Duplicate",
    "Error",
    "Forked",
    "FormatError",
    "Full",
    "Job",
    "LimitError",
    "Logprobs",
    "Model",
    "ModelInfo",
    "NoDevice",
    "NonFinite",
    "NotFound",
    "OutOfMemory",
    "Runtime",
    "Sample",
    "Samples",
    "Scores",
    "ShapeError",
    "TemplateError",
    "TensorInfo",
    "Timeout",
    "Tokenizer",
    "Unsupported",
    "Update",
    "devices",
]
