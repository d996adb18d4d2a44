"""One step of online RL as one job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import errors
from ._arrays import Bytes, borrowed, pointer
from ._handle import Handle, call, struct, view
from ._native import ffi, lib
from .results import Samples
from .sampling import SampleRequest, held
from .tokenizer import Message, Turns
from .update import one_of

if TYPE_CHECKING:
    from .adapter import Adapter
    from .model import Model

_ADVANTAGE = {
    "group": lib.RRT_ADVANTAGE_GROUP,
    "leave_one_out": lib.RRT_ADVANTAGE_LEAVE_ONE_OUT,
    "batch": lib.RRT_ADVANTAGE_BATCH,
    "centred": lib.RRT_ADVANTAGE_CENTRED,
    "none": lib.RRT_ADVANTAGE_NONE,
}


@dataclass(frozen=True)
class Reward:
    """A model that scores the answers of a rollout."""

    model: Model
    weight: float = 1.0
    """In the sum that is an answer's reward"""
    rule: str | None = None
    """As in :meth:`Model.score`"""
    label: int = 0
    """Which of the rule's values is the reward"""
    adapter: Adapter | None = None
    """Of that model"""
    name: str = ""
    """For messages"""
    question: str | None = None
    """What a judge is asked: a user message in which {prompt} and {answer} stand for the texts. Without it the model
    reads prompt and answer"""


class Rollout(Samples):
    """The answers with what training needs of them. Arrays of tokens are side by side over all answers, as in
    :class:`Samples`."""

    ref_logprobs: np.ndarray
    """float32 [tokens], of the reference; empty without one, and so the next three"""
    kl1: np.ndarray
    """float32 [tokens]; k1 = model_logprobs - ref_logprobs: unbiased"""
    kl2: np.ndarray
    """float32 [tokens]; k2 = k1² / 2"""
    kl3: np.ndarray
    """float32 [tokens]; k3 = exp(-k1) - 1 + k1: unbiased, never negative"""
    rewards: np.ndarray
    """float32 [reward models, count]; NaN where one could not score"""
    reward: np.ndarray
    """float32 [count], the weighted sum"""
    advantages: np.ndarray
    """float32 [count]"""
    group_mean: np.ndarray
    """float32 [prompts], of reward"""
    group_std: np.ndarray
    """float32 [prompts]"""
    group_zero_variance: np.ndarray
    """uint32 [prompts]; 1: all rewards are equal, there is nothing to learn"""
    group_best: np.ndarray
    """int64 [prompts]; the answer with the highest reward, counted over all; -1 where no two rewards differ"""
    group_worst: np.ndarray
    """int64 [prompts]; and the one with the lowest; -1 likewise"""
    reward_version: np.ndarray
    """uint64 [reward models, count]; of the weights that gave the rewards, 0 where one could not score"""
    ref_version: np.ndarray
    """uint64 [count]; of the reference's weights; empty without one"""

    def __init__(self, handle: Handle, *, top: bool = False) -> None:
        super().__init__(handle, top=top)
        found = view("rrt_rollout_view")
        call(lib.rrt_result_rollout, handle, found)
        tokens, count, groups = int(self.offsets[-1]), found.count, found.group_count
        self.ref_logprobs = borrowed(found.ref_logprob, tokens, handle)
        self.kl1 = borrowed(found.kl1, tokens, handle)
        self.kl2 = borrowed(found.kl2, tokens, handle)
        self.kl3 = borrowed(found.kl3, tokens, handle)
        self.rewards = borrowed(found.rewards, found.reward_count * count, handle).reshape(found.reward_count, count)
        self.reward = borrowed(found.reward, count, handle)
        self.advantages = borrowed(found.advantage, count, handle)
        self.group_mean = borrowed(found.group_mean, groups, handle)
        self.group_std = borrowed(found.group_std, groups, handle)
        self.group_zero_variance = borrowed(found.group_zero_variance, groups, handle)
        self.group_best = _indices(borrowed(found.group_best, groups, handle))
        self.group_worst = _indices(borrowed(found.group_worst, groups, handle))
        self.reward_version = borrowed(found.reward_version, self.rewards.size, handle).reshape(self.rewards.shape)
        self.ref_version = borrowed(found.ref_version, count, handle)


def _indices(found: np.ndarray) -> np.ndarray:
    """The library's indices, of which UINT32_MAX is none."""
    return np.where(found == np.iinfo(np.uint32).max, -1, found.astype(np.int64))


class RolloutRequest:
    """An rrt_rollout_req, with all that it points to; ``handles`` of it are what its job needs."""

    def __init__(
        self,
        sample: SampleRequest,
        conversations: Sequence[Sequence[Message]],
        *,
        reference: Model | str | None,
        rewards: Sequence[Reward],
        advantage: str,
        clip_reward: tuple[float, float] | None,
    ) -> None:
        self._sample = sample
        self.handles = [*sample.handles]
        self.struct: Any = struct(
            "rrt_rollout_req", sample=sample.struct, advantage=one_of(_ADVANTAGE, advantage, "advantage")
        )
        if reference == "base":
            self.struct.flags |= lib.RRT_ROLLOUT_BASE_REFERENCE
        elif isinstance(reference, str):
            raise errors.ArgumentError(f"reference is {reference!r}, it must be a Model, 'base' or None")
        elif reference is not None:
            self.struct.reference = held(self.handles, reference._open())
        if clip_reward is not None:
            self.struct.flags |= lib.RRT_ROLLOUT_CLIP_REWARD
            self.struct.clip_low, self.struct.clip_high = clip_reward
        self._set_rewards(rewards)
        if conversations:
            self._turns = Turns([message for turns in conversations for message in turns])
            self._offsets = np.cumsum([0, *map(len, conversations)], dtype=np.uintp)
            self.struct.messages, _, self.struct.message_stride = self._turns.arguments
            self.struct.message_offsets = pointer("size_t", self._offsets)

    def _set_rewards(self, rewards: Sequence[Reward]) -> None:
        self._rewards = ffi.new("rrt_reward[]", len(rewards))
        self._kept: list[Any] = []
        for target, reward in zip(self._rewards, rewards, strict=True):
            lib.rrt_reward_init(ffi.addressof(target))
            target.model = held(self.handles, reward.model._open())
            target.weight, target.label = reward.weight, reward.label
            if reward.adapter is not None:
                target.adapter = held(self.handles, reward.adapter._open())
            self._set_text(target, "name", reward.name)
            self._set_text(target, "rule", reward.rule)
            self._set_text(target, "question", reward.question)
        self.struct.rewards, self.struct.reward_count = self._rewards, len(rewards)
        self.struct.reward_stride = ffi.sizeof("rrt_reward")

    def _set_text(self, target: Any, field: str, text: str | None) -> None:
        if text is not None:
            data = Bytes(text)
            self._kept.append(data)
            setattr(target, field, data.pointer)
            setattr(target, f"{field}_len", data.length)
