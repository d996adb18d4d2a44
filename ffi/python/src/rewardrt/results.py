"""Results: numpy arrays over the library's own memory.

Nothing is copied. The arrays are read-only and keep the result alive, also after the runtime was closed. Pickling a result
copies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ._arrays import borrowed
from ._handle import Handle, call, view
from ._native import lib

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

    offsets: np.ndarray
    """[count + 1]"""
    ids: np.ndarray
    logprobs: np.ndarray
    model_logprobs: np.ndarray
    entropy: np.ndarray
    kept: np.ndarray
    threshold: np.ndarray
    finish: np.ndarray
    """int32 [count], RRT_FINISH_…; a :class:`Sample` has the word"""
    prompt_index: np.ndarray
    """uint32 [count]"""
    sample_index: np.ndarray
    """uint32 [count]"""
    version: np.ndarray
    """uint64 [count]"""
    adapter_version: np.ndarray
    """uint64 [count]"""

    def __init__(self, handle: Handle) -> None:
        found = view("rrt_sequences_view")
        call(lib.rrt_result_sequences, handle.pointer, found)
        count = found.count
        _take(self, found, handle, count + 1, offsets="offsets", _text_offsets="text_offsets", _span_offsets="span_offsets")
        _take(self, found, handle, int(self.offsets[count]), ids="ids", logprobs="sample_logprob", model_logprobs="logprob",
              entropy="entropy", kept="kept", threshold="threshold")  # fmt: skip
        _take(self, found, handle, count, finish="finish", prompt_index="prompt_index", sample_index="sample_index",
              version="version", adapter_version="adapter_version")  # fmt: skip
        _take(self, found, handle, int(self._text_offsets[count]), _text="text")
        _take(self, found, handle, int(self._span_offsets[count]), _span_end="span_end", _span_version="span_version")

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
        return self._text[int(self._text_offsets[i]) : int(self._text_offsets[i + 1])].tobytes().decode("utf-8")


class _Rows(Sequence[np.ndarray]):
    """Rows of values of different lengths; row ``i`` is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray
    """[count + 1]"""
    values: np.ndarray
    """float32, all rows side by side"""
    version: np.ndarray
    """uint64 [count], of the weights"""
    adapter_version: np.ndarray
    """uint64 [count]; 0 without an adapter"""

    def __init__(self, handle: Handle) -> None:
        found = view("rrt_scores_view")
        call(lib.rrt_result_scores, handle.pointer, found)
        _take(self, found, handle, found.count + 1, offsets="offsets")
        _take(self, found, handle, int(self.offsets[found.count]), values="values")
        _take(self, found, handle, found.count, version="version", adapter_version="adapter_version")

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


def _take(result: Any, found: Any, handle: Handle, count: int, **fields: str) -> None:
    """Makes attributes of a view's arrays of one length."""
    for attribute, field in fields.items():
        setattr(result, attribute, borrowed(getattr(found, field), count, handle))


def joined(parts: Sequence[Any], first_prompts: Sequence[int] | None = None) -> Any:
    """One result of the results of several requests, in their order.

    ``first_prompts``: for :class:`Samples`, where each part's prompts begin in the whole.
    """
    whole = object.__new__(type(parts[0]))
    for name in vars(parts[0]):
        arrays = [getattr(part, name) for part in parts]
        if name.endswith("offsets"):
            ends = np.cumsum([0] + [int(a[-1]) for a in arrays])
            arrays = [a[:-1] + np.uintp(end) for a, end in zip(arrays, ends, strict=False)] + [ends[-1:].astype(np.uintp)]
        elif name == "prompt_index" and first_prompts is not None:
            arrays = [a + np.uint32(first) for a, first in zip(arrays, first_prompts, strict=True)]
        setattr(whole, name, np.concatenate(arrays))
    return whole
