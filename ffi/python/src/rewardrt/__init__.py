"""rewardrt: sampling and reward scoring for online RLHF, inside your own process.

    import rewardrt

    with rewardrt.Runtime() as runtime:
        model = runtime.load_model("path/to/model")
        samples = model.sample("The capital of France is", n=4, max_tokens=16, seed=1).result()
        print(samples.texts, samples[0].logprobs)

- :class:`Runtime`: an engine on a device; :func:`devices` lists them.
- :class:`Model`: ``sample``, ``stream``, ``session``, ``rollout``, ``logprobs``, ``score``, ``score_steps``,
  ``update``, ``follow``, ``load_adapter``. :class:`Sampling` has the options.
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
from .follower import Follower
from .job import Chunk, Job, SampleStream
from .model import Model, ModelInfo, TensorInfo
from .results import Logprobs, Sample, Samples, Scores, StepScores
from .rollout import Reward, Rollout
from .runtime import Device, Runtime, devices
from .sampling import Sampling
from .session import Session
from .stats import JobTiming, Memory, Timing
from .tokenizer import Tokenizer
from .update import Update

__version__ = _ffi.string(_lib.rrt_version()).decode().split()[-1]

__all__ = [
    "Adapter",
    "ArgumentError",
    "Busy",
    "Cancelled",
    "Chunk",
    "Closed",
    "Conflict",
    "Device",
    "DeviceLost",
    "Duplicate",
    "Error",
    "Follower",
    "Forked",
    "FormatError",
    "Full",
    "Job",
    "JobTiming",
    "LimitError",
    "Logprobs",
    "Memory",
    "Model",
    "ModelInfo",
    "NoDevice",
    "NonFinite",
    "NotFound",
    "OutOfMemory",
    "Reward",
    "Rollout",
    "Runtime",
    "Sample",
    "SampleStream",
    "Samples",
    "Sampling",
    "Scores",
    "Session",
    "ShapeError",
    "StepScores",
    "TemplateError",
    "TensorInfo",
    "Timeout",
    "Timing",
    "Tokenizer",
    "Unsupported",
    "Update",
    "devices",
]
