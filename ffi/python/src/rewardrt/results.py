"""Results: numpy arrays over the library's own memory.

Nothing is copied. The arrays are read-only and keep the result alive, also after the runtime was closed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ._arrays import borrowed
from ._handle import Handle, call, view
from ._native import ffi, lib

_FINISH = {
    lib.RRT_FINISH_STOP: "stop",
    lib.RRT_FINISH_LENGTH: "length",
    lib.RRT_FINISH_CANCELLED: "cancelled",
    lib.RRT_FINISH_BLOCKED: "blocked",
}


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt. The arrays are [tokens of the answer], stop tokens included."""

    ids: np.ndarray
    """uint32"""
    logprobs: np.ndarray
    """float32; ln p of each token in the distribution that it was drawn from (temperature, penalties, top-k, top-p, …)"""
    model_logprobs: np.ndarray
    """float32; ln p at temperature 1 over the whole vocabulary, to the bit what :meth:`Model.logprobs` gives"""
    entropy: np.ndarray
    """float32, in nats; of the model's distribution"""
    kept: np.ndarray
    """uint32; how many tokens could have been drawn"""
    threshold: np.ndarray
    """float32; the smallest penalised logit / temperature among them"""
    text: str
    """Decoded without special tokens, cut at a stop string; empty for a model without a tokenizer"""
    finish: str
    """"stop", "length", "cancelled" or "blocked" (no token could come next)"""
    prompt: int
    """Index of the prompt in the request"""
    sample: int
    """Index among the samples of the prompt"""
    version: int
    """Of the weights that the last token came from"""
    spans: tuple[tuple[int, int], ...]
    """(end, version): which weights sampled which tokens, in order; a span begins where the one before it ends"""
    adapter_version: int
    """0 without an adapter"""


class Samples(Sequence[Sample]):
    """The answers of a sampling job in the order (prompt, sample).

    Arrays of tokens are side by side over all answers: those of answer ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.
    :class:`Sample` explains them.
    """

    def __init__(self, handle: Handle) -> None:
        found = view("rrt_sequences_view")
        call(lib.rrt_result_sequences, handle.pointer, found)
        count = found.count
        self.offsets = borrowed(found.offsets, count + 1, handle)
        """[count + 1]"""
        tokens = int(self.offsets[count])
        self.ids = borrowed(found.ids, tokens, handle)
        self.logprobs = borrowed(found.sample_logprob, tokens, handle)
        self.model_logprobs = borrowed(found.logprob, tokens, handle)
        self.entropy = borrowed(found.entropy, tokens, handle)
        self.kept = borrowed(found.kept, tokens, handle)
        self.threshold = borrowed(found.threshold, tokens, handle)
        self.finish = borrowed(found.finish, count, handle)
        """int32 [count], RRT_FINISH_…; a :class:`Sample` has the word"""
        self.prompt_index = borrowed(found.prompt_index, count, handle)
        """uint32 [count]"""
        self.sample_index = borrowed(found.sample_index, count, handle)
        """uint32 [count]"""
        self.version = borrowed(found.version, count, handle)
        """uint64 [count]"""
        self.adapter_version = borrowed(found.adapter_version, count, handle)
        """uint64 [count]"""
        self._text_offsets = borrowed(found.text_offsets, count + 1, handle)
        self._text = found.text
        self._span_offsets = borrowed(found.span_offsets, count + 1, handle)
        spans = int(self._span_offsets[count])
        self._span_end = borrowed(found.span_end, spans, handle)
        self._span_version = borrowed(found.span_version, spans, handle)
        self._handle = handle

    @property
    def texts(self) -> list[str]:
        """The text of every answer."""
        return [self._text_of(i) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        tokens = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        spans = slice(int(self._span_offsets[i]), int(self._span_offsets[i + 1]))
        return Sample(
            ids=self.ids[tokens],
            logprobs=self.logprobs[tokens],
            model_logprobs=self.model_logprobs[tokens],
            entropy=self.entropy[tokens],
            kept=self.kept[tokens],
            threshold=self.threshold[tokens],
            text=self._text_of(i),
            finish=_FINISH[int(self.finish[i])],
            prompt=int(self.prompt_index[i]),
            sample=int(self.sample_index[i]),
            version=int(self.version[i]),
            spans=tuple(zip(self._span_end[spans].tolist(), self._span_version[spans].tolist(), strict=True)),
            adapter_version=int(self.adapter_version[i]),
        )

    def _text_of(self, i: int) -> str:
        start, end = int(self._text_offsets[i]), int(self._text_offsets[i + 1])
        return ffi.buffer(self._text + start, end - start)[:].decode("utf-8") if end > start else ""


class _Rows(Sequence[np.ndarray]):
    """Rows of values of different lengths; row ``i`` is ``values[offsets[i]:offsets[i + 1]]``."""

    def __init__(self, handle: Handle) -> None:
        found = view("rrt_scores_view")
        call(lib.rrt_result_scores, handle.pointer, found)
        self.offsets = borrowed(found.offsets, found.count + 1, handle)
        """[count + 1]"""
        self.values = borrowed(found.values, int(self.offsets[found.count]), handle)
        """float32, all rows side by side"""
        self.version = borrowed(found.version, found.count, handle)
        """uint64 [count], of the weights"""
        self.adapter_version = borrowed(found.adapter_version, found.count, handle)
        """uint64 [count]; 0 without an adapter"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self.values[int(self.offsets[i]) : int(self.offsets[i + 1])]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


class Logprobs(_Rows):
    """Row ``i``: ln p of each token after the prompt of sequence ``i``, float32; NaN where nothing precedes the token."""

    @property
    def sums(self) -> np.ndarray:
        """The sum of every row's log-probs, float64 [count]; a token without any counts as 0."""
        return np.array([np.nansum(row, dtype=np.float64) for row in self])


class Scores(_Rows):
    """Row ``i``: the label values of sequence ``i``, float32, in the order of the labels."""

    @property
    def first(self) -> np.ndarray:
        """The first label's value of every sequence, float32 [count]: the reward of a model with one label."""
        return self.values[self.offsets[:-1].astype(np.intp)]
