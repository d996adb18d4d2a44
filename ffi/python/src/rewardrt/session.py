"""Rollouts of several turns."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import errors
from ._arrays import pointer
from ._handle import Handle, call, filled, open_handle
from ._inputs import Prompt
from ._native import lib
from .job import Job
from .results import Samples
from .sampling import SampleRequest, Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Session:
    """A sequence that grows by what is appended (a prompt, a tool's answer) and by what is sampled, from
    :meth:`Model.session`.

    Ids stay as they are, nothing is encoded again, and the KV cache keeps the turns as long as there is room. Sampling
    in a session returns what sampling its tokens as one prompt returns, to the bit.
    """

    def __init__(self, handle: Handle, model: Any) -> None:
        self._handle: Handle | None = handle
        self._model = model

    def append(self, turn: Prompt) -> None:
        """Appends a text, ids or messages. :class:`Busy` while a job samples, :class:`LimitError` beyond the model's
        context."""
        ids = self._model._sequences([turn], "turn")[0]
        call(lib.rrt_session_append, self._open(), pointer("uint32_t", ids), ids.size)

    def sample(self, **options: Unpack[Sampling]) -> Job[Samples]:
        """Samples the next turn, with the options of :class:`Sampling` but ``n`` and ``streams``.

        The turn is part of the session once the job's result was taken. :class:`Busy` while another job samples.
        """
        if options.get("streams") is not None:
            raise errors.ArgumentError("streams: a session's turns have stream 0, let seed differ")
        request = SampleRequest(None, [], options)
        model = self._model
        live = model._submit_by(lib.rrt_session_sample, self._open(), request)
        return model._tracked(Job(live, partial(Samples, top=bool(options.get("top_logprobs")))))

    @property
    def ids(self) -> np.ndarray:
        """All its tokens, uint32."""
        handle = self._open()
        return np.frombuffer(
            filled("uint32_t", 1024, lambda *out: call(lib.rrt_session_tokens, handle, *out)), np.uint32
        )

    def fork(self) -> Session:
        """Another session with the same tokens, which goes its own way."""
        handle = self._open()
        forked = open_handle("rrt_session", lib.rrt_session_fork, lib.rrt_session_free, handle, parent=handle.parent)
        return self._model._tracked(Session(forked, self._model))

    def close(self) -> None:
        """Frees it; a job that samples for it goes on."""
        self._handle = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the session is closed")
        return self._handle
