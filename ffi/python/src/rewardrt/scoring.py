"""The requests of :meth:`Model.logprobs`, :meth:`Model.score` and :meth:`Model.score_steps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import errors
from ._arrays import Bytes, Packed, numbers, pointer
from ._handle import Handle, struct
from .adapter import Adapter
from .sampling import deadline_ns, held


def is_judge(rule: str | None) -> bool:
    """Whether a rule reads the next token, so that a conversation ends with the opening of an answer."""
    return rule is not None and rule.startswith("judge")


class ScoreRequest:
    """An rrt_score_req, with all that it points to; ``handles`` of it are what its job needs."""

    def __init__(
        self,
        kind: int,
        model: Handle,
        sequences: Sequence[np.ndarray],
        *,
        rule: str | None = None,
        prompt_lens: Sequence[int] | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        adapter: Adapter | None = None,
        deadline: float | None = None,
        **plain: int,
    ) -> None:
        self._sequences = Packed(sequences)
        self.handles: list[Handle] = []
        self.struct: Any = struct("rrt_score_req", kind=kind, model=held(self.handles, model), **plain)
        if adapter is not None:
            self.struct.adapter = held(self.handles, adapter._open())
        self._sequences.write(self.struct.sequences)
        if deadline is not None:
            self.struct.deadline_ns = deadline_ns(deadline)
        if rule is not None:
            self._rule = Bytes(rule)
            self.struct.rule, self.struct.rule_len = self._rule.pointer, self._rule.length
        if prompt_lens is not None:
            self._lengths = numbers(prompt_lens, "uintp", "prompt_lens", len(sequences))
            self.struct.prompt_lens = pointer("size_t", self._lengths)
        if positions is not None:
            if len(positions) != len(sequences):
                raise errors.ArgumentError(
                    f"positions has {len(positions)} elements, it must have one for each of {len(sequences)} sequences"
                )
            rows = [numbers(row, "uintp", f"positions[{i}]") for i, row in enumerate(positions)]
            self._offsets = np.cumsum([0, *map(len, rows)], dtype=np.uintp)
            self._positions = np.concatenate(rows) if rows else np.empty(0, np.uintp)
            self.struct.positions = pointer("size_t", self._positions)
            self.struct.position_offsets = pointer("size_t", self._offsets)
