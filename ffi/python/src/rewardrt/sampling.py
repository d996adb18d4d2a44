"""How answers are sampled: the options of :meth:`Model.sample`, of sessions and of rollouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from . import errors
from ._arrays import Bytes, Packed, Strings, numbers, pointer, token_ids
from ._handle import Handle, struct
from ._native import lib
from .adapter import Adapter


class Sampling(TypedDict, total=False):
    """Options of a request that samples. The filters are applied in transformers' order; ties share a fate."""

    n: int
    """Answers to each prompt; 1."""
    max_tokens: int
    """Of an answer, 128; fewer if the model's context ends first."""
    min_tokens: int
    """Until then tokens that end a sequence cannot be drawn; 0."""
    temperature: float
    """1; 0 is greedy."""
    top_k: int
    """Keep the k most likely tokens; 0 is all."""
    top_p: float
    """Keep the most likely tokens that hold this much of the probability; 1 is all."""
    min_p: float
    """Keep tokens at least this fraction as likely as the most likely one; 0 is all."""
    typical_p: float
    """Of what is left keep what is about as surprising as expected; 1 is all."""
    repetition_penalty: float
    """Divides or multiplies the logits of tokens in the sequence; 1 is off."""
    presence_penalty: float
    """Subtracted from logits of tokens that were generated; 0."""
    frequency_penalty: float
    """Subtracted once for each time that the token was generated; 0."""
    logit_bias: Mapping[int, float]
    """Token → added to its logit before the penalties; -inf bans it."""
    banned_ids: Sequence[int]
    """Tokens that are never drawn."""
    allowed_ids: Sequence[int] | None
    """The only tokens that may be drawn; None is all."""
    seed: int
    """(seed, stream, sample, position) names a draw, whatever else is computed at the time; 0."""
    streams: Sequence[int] | None
    """[prompts]; without them a prompt's stream is its index."""
    stop: str | Sequence[str]
    """Strings that end an answer; its text is cut there, its ids are kept."""
    stop_ids: Sequence[int]
    """Tokens that do, besides the model's own."""
    ignore_eos: bool
    """Do not stop at the model's end-of-sequence tokens."""
    json_schema: str | Mapping[str, Any]
    """The text is JSON that satisfies this schema."""
    regex: str
    """The text matches this regular expression as a whole."""
    grammar: str
    """The text is of this grammar, in llguidance's Lark dialect, from its rule `start`."""
    choices: Sequence[str]
    """The text is one of these."""
    best_of: int
    """Draw so many a prompt and return the n with the highest mean model log-prob, best first; 0 is n."""
    top_logprobs: int
    """Report so many of the most likely tokens at each place; 0."""
    kept_ids: int
    """Report which tokens could have been drawn, where they are not more than so many; 0."""
    speculate: int
    """Guess so many tokens ahead where a text repeats itself: the same result, sooner; 0."""
    adapter: Adapter | None
    """A LoRA adapter of the model."""
    priority: int
    """Jobs of higher priority go first; 0. Results do not depend on it."""
    deadline: float | None
    """Seconds from now after which the job ends as if it were cancelled."""


# Option → field, where the value is passed on as it is.
_PLAIN = {
    "n": "n_samples",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "best_of": "best_of",
    "top_logprobs": "top_logprobs",
    "kept_ids": "kept_ids",
    "speculate": "speculate",
    "priority": "priority",
}
_GUIDES = {
    "json_schema": lib.RRT_GUIDE_JSON_SCHEMA,
    "regex": lib.RRT_GUIDE_REGEX,
    "grammar": lib.RRT_GUIDE_GRAMMAR,
    "choices": lib.RRT_GUIDE_CHOICES,
}


class SampleRequest:
    """An rrt_sample_req, with all that it points to; ``handles`` of it are what its job needs."""

    def __init__(
        self, model: Handle | None, prompts: Sequence[np.ndarray], options: Sampling, *, stream: bool = False
    ) -> None:
        unknown = set(options) - set(Sampling.__annotations__)
        if unknown:
            raise TypeError(
                f"{sorted(unknown)[0]!r} is no option of sampling; there are {', '.join(Sampling.__annotations__)}"
            )
        self._kept: list[Any] = []
        self.handles: list[Handle] = []
        plain = {_PLAIN[name]: value for name, value in options.items() if name in _PLAIN}
        flags = lib.RRT_SAMPLE_IGNORE_EOS if options.get("ignore_eos") else 0
        self.struct = struct("rrt_sample_req", flags=flags | (lib.RRT_SAMPLE_STREAM if stream else 0), **plain)
        if model is not None:
            self.struct.model = held(self.handles, model)
        if prompts:
            self._keep(Packed(prompts)).write(self.struct.prompts)
        if options.get("streams") is not None:
            self._array("streams", "uint64_t", numbers(options["streams"], "uint64", "streams", len(prompts)))
        adapter = options.get("adapter")
        if adapter is not None:
            self.struct.adapter = held(self.handles, adapter._open())
        deadline = options.get("deadline")
        if deadline is not None:
            self.struct.deadline_ns = deadline_ns(deadline)
        self._stops(options)
        self._bias(options)
        self._guide(options)

    def _stops(self, options: Sampling) -> None:
        given = options.get("stop", ())
        stops = self._keep(Strings([given] if isinstance(given, str) else given))
        if stops.count:
            self.struct.stop_text, self.struct.stop_count = stops.pointer, stops.count
            self.struct.stop_offsets = pointer("size_t", stops.offsets)
        self.struct.stop_id_count = self._array(
            "stop_ids", "uint32_t", token_ids(options.get("stop_ids", ()), "stop_ids")
        )

    def _bias(self, options: Sampling) -> None:
        bias = options.get("logit_bias") or {}
        self._array("bias_ids", "uint32_t", token_ids(list(bias), "logit_bias"))
        self.struct.bias_count = self._array("bias", "float", np.fromiter(bias.values(), np.float32, len(bias)))
        banned = token_ids(options.get("banned_ids", ()), "banned_ids")
        self.struct.banned_count = self._array("banned_ids", "uint32_t", banned)
        if options.get("allowed_ids") is not None:
            allowed = token_ids(options["allowed_ids"], "allowed_ids")
            if not allowed.size:
                raise errors.ArgumentError("allowed_ids is empty, so nothing could be drawn; None allows all")
            self.struct.allowed_count = self._array("allowed_ids", "uint32_t", allowed)

    def _guide(self, options: Sampling) -> None:
        given = [name for name in _GUIDES if options.get(name) is not None]
        if len(given) > 1:
            raise errors.ArgumentError(f"{' and '.join(given)}: an answer has one guide")
        for name in given:
            value = options[name]  # type: ignore[literal-required]
            self.struct.guide_kind = _GUIDES[name]
            if name == "choices":
                choices = self._keep(Strings(value))
                self.struct.guide, self.struct.guide_len = choices.pointer, len(choices.data)
                self.struct.choice_offsets, self.struct.choice_count = pointer("size_t", choices.offsets), choices.count
            else:
                text = self._keep(Bytes(value if isinstance(value, str) else json.dumps(value)))
                self.struct.guide, self.struct.guide_len = text.pointer, text.length

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def _array(self, field: str, c_type: str, array: np.ndarray) -> int:
        if array.size:
            setattr(self.struct, field, pointer(c_type, self._keep(array)))
        return array.size


def deadline_ns(seconds: float) -> int:
    """A deadline as requests take it, where 0 would be none."""
    if not 0 < seconds < 2**63 / 1e9:
        raise errors.ArgumentError(f"deadline is {seconds}, it must be more than 0 seconds, or None for none")
    return max(1, int(seconds * 1e9))


def held(handles: list[Handle], handle: Handle) -> Any:
    """A handle's pointer, for a struct of a request that keeps the handle."""
    handles.append(handle)
    return handle.pointer
