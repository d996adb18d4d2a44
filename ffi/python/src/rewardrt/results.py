"""Results: numpy arrays over the library's own memory.

Nothing is copied. The arrays are read-only and keep the result alive, also after the runtime was closed. Pickling a
result copies it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ._arrays import borrowed
from ._handle import Handle, call, view
from ._native import lib
from .stats import JobTiming, numbers_of

FINISH = {
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
    """float32; ln p of each token in the distribution that it was drawn from (temperature, penalties, top-k, top-p,
    …)"""
    model_logprobs: np.ndarray
    """float32; ln p at temperature 1 over the whole vocabulary, to the bit what :meth:`Model.logprobs` gives"""
    entropy: np.ndarray
    """float32, in nats; of the model's distribution"""
    kept: np.ndarray
    """uint32; how many tokens could have been drawn"""
    threshold: np.ndarray
    """float32; the smallest penalised logit / temperature among them"""
    ceiling: np.ndarray
    """float32; the largest one; infinity unless typical_p cuts from above"""
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
    ceiling: np.ndarray
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

    timing: JobTiming | None
    """What the job has cost"""
    _text_offsets: np.ndarray
    _text: np.ndarray
    _span_offsets: np.ndarray
    _span_end: np.ndarray
    _span_version: np.ndarray
    _kept_offsets: np.ndarray
    _kept_ids: np.ndarray

    def __init__(self, handle: Handle, *, top: bool = False) -> None:
        found = view("rrt_sequences_view")
        call(lib.rrt_result_sequences, handle, found)
        count = found.count
        _take(
            self,
            found,
            handle,
            count + 1,
            offsets="offsets",
            _text_offsets="text_offsets",
            _span_offsets="span_offsets",
        )
        _take(
            self,
            found,
            handle,
            int(self.offsets[count]),
            ids="ids",
            logprobs="sample_logprob",
            model_logprobs="logprob",
            entropy="entropy",
            kept="kept",
            threshold="threshold",
            ceiling="ceiling",
        )
        _take(
            self,
            found,
            handle,
            count,
            finish="finish",
            prompt_index="prompt_index",
            sample_index="sample_index",
            version="version",
            adapter_version="adapter_version",
        )
        _take(self, found, handle, int(self._text_offsets[count]), _text="text")
        _take(self, found, handle, int(self._span_offsets[count]), _span_end="span_end", _span_version="span_version")
        tokens = int(self.offsets[count])
        _take(self, found, handle, tokens + 1 if found.kept_offsets else 0, _kept_offsets="kept_offsets")
        _take(self, found, handle, int(self._kept_offsets[-1]) if found.kept_offsets else 0, _kept_ids="kept_ids")
        _top(self, handle, top)
        self.timing = numbers_of(JobTiming, "rrt_job_timing", lib.rrt_result_timing, handle)

    def kept_ids(self, index: int) -> list[np.ndarray]:
        """Of a request with ``kept_ids``: for each token of an answer the tokens that could have been drawn, uint32;
        none where they were too many."""
        return _nested(self.offsets, index, self._kept_offsets, self._kept_ids)

    def top(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of a request with ``top_logprobs``: for each token of an answer the most likely ones, best first: (ids
        uint32, log-probs float32 at temperature 1)."""
        return _top_of(self, index)

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
            ceiling=self.ceiling[tokens],
            text=self._text_of(i),
            finish=FINISH[int(self.finish[i])],
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
    _score: np.ndarray

    def __init__(self, handle: Handle) -> None:
        found = view("rrt_scores_view")
        call(lib.rrt_result_scores, handle, found)
        self._read(handle, found)
        _take(self, found, handle, found.count + 1, offsets="offsets")
        _take(self, found, handle, int(self.offsets[found.count]), values="values")
        _take(self, found, handle, found.count, version="version", adapter_version="adapter_version", _score="score")
        self.timing: JobTiming | None = numbers_of(JobTiming, "rrt_job_timing", lib.rrt_result_timing, handle)
        """What the job has cost"""

    def _read(self, handle: Handle, found: Any) -> None:
        """What a kind of result has besides."""

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
    """Row ``i``: ln p of each token after the prompt of sequence ``i``, float32; NaN where nothing precedes the
    token."""

    entropy: np.ndarray
    """float32, as values: of the distribution that each token is from, in nats"""

    def __init__(self, handle: Handle, *, top: bool = False) -> None:
        super().__init__(handle)
        _top(self, handle, top)

    def _read(self, handle: Handle, found: Any) -> None:
        _take(self, found, handle, found.offsets[found.count], entropy="entropy")

    @property
    def sums(self) -> np.ndarray:
        """The sum of every row, float32 [count]; a token that nothing precedes does not count."""
        return self._score

    def top(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of a request with ``top_logprobs``: for each token of a row the most likely ones, best first: (ids uint32,
        log-probs float32)."""
        return _top_of(self, index)


class Scores(_Rows):
    """Row ``i``: the label values of sequence ``i``, float32, in the order of ``labels``."""

    labels: tuple[str, ...]

    def _read(self, handle: Handle, found: Any) -> None:
        offsets = borrowed(found.label_offsets, found.label_count + 1, handle)
        text = borrowed(found.label_text, int(offsets[-1]), handle).tobytes()
        self.labels = tuple(text[int(a) : int(b)].decode("utf-8") for a, b in itertools.pairwise(offsets))

    @property
    def score(self) -> np.ndarray:
        """The value of the request's label for every sequence, float32 [count]."""
        return self._score


class StepScores(Scores):
    """Row ``i``: the label values of sequence ``i`` at each of its positions, float32 [positions, labels]."""

    _position: np.ndarray

    def _read(self, handle: Handle, found: Any) -> None:
        super()._read(handle, found)
        _take(self, found, handle, found.offsets[found.count] // found.label_count, _position="position")

    def positions(self, index: int) -> np.ndarray:
        """The tokens of a sequence after which the rule was read, counted from its first, uint32."""
        i, labels = range(len(self))[index], len(self.labels)
        return self._position[int(self.offsets[i]) // labels : int(self.offsets[i + 1]) // labels]

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        return row if isinstance(index, slice) else row.reshape(-1, len(self.labels))

    @property
    def score(self) -> np.ndarray:
        """The value of the request's label at the last position of every sequence, float32 [count]; NaN if there is
        none."""
        return self._score


def _take(result: Any, found: Any, handle: Handle, count: int, **fields: str) -> None:
    """Makes attributes of a view's arrays of one length."""
    for attribute, field in fields.items():
        setattr(result, attribute, borrowed(getattr(found, field), count, handle))


def joined(parts: Sequence[Any], first_prompts: Sequence[int] | None = None) -> Any:
    """One result of the results of several requests, in their order.

    ``first_prompts``: for :class:`Samples`, where each part's prompts begin in the whole.
    """
    whole = object.__new__(type(parts[0]))
    for name, value in vars(parts[0]).items():
        arrays = [getattr(part, name) for part in parts]
        if not isinstance(value, np.ndarray):
            # Labels are the same in all parts; a cost belongs to one job.
            setattr(whole, name, None if name == "timing" else value)
            continue
        if name.endswith("offsets") and value.size:
            ends = np.cumsum([0] + [int(a[-1]) for a in arrays])
            arrays = [a[:-1] + np.uintp(end) for a, end in zip(arrays, ends, strict=False)] + [
                ends[-1:].astype(np.uintp)
            ]
        elif name == "prompt_index" and first_prompts is not None:
            arrays = [a + np.uint32(first) for a, first in zip(arrays, first_prompts, strict=True)]
        setattr(whole, name, np.concatenate(arrays))
    return whole


def _top(result: Any, handle: Handle, asked: bool) -> None:
    """The most likely tokens of each place, if the request asked for them."""
    result._top_offsets = result._top_ids = result._top_logprobs = np.empty(0, np.uintp)
    if asked:
        found = view("rrt_topk_view")
        call(lib.rrt_result_topk, handle, found)
        _take(result, found, handle, found.count + 1, _top_offsets="offsets")
        _take(result, found, handle, int(result._top_offsets[-1]), _top_ids="ids", _top_logprobs="logprob")


def _top_of(result: Any, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    ids = _nested(result.offsets, index, result._top_offsets, result._top_ids)
    return list(zip(ids, _nested(result.offsets, index, result._top_offsets, result._top_logprobs), strict=True))


def _nested(outer: np.ndarray, index: int, inner: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """What belongs to each token of a sequence; nothing if the request did not ask for it."""
    if not inner.size:
        return []
    i = range(len(outer) - 1)[index]
    ends = inner[int(outer[i]) : int(outer[i + 1]) + 1]
    return [values[int(a) : int(b)] for a, b in itertools.pairwise(ends)]
