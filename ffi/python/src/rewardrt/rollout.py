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
from .sampling import SampleRequest, adapter_pointer
from .tokenizer import Message, Turns
from .update import one_of

if TYPE_CHECKING:
    from .adapter import Adapter
    from .model import Model

_ADVANTAGE = {
    "group": lib.RRT_ADVANTAGE_GROUP,
    "leave_one_out": lib.RRT_ADVANTAGE_LEAVE_ONE_OUT,
    "batch": lib.RRT_ADVANTAGE_BATCH,
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
    """uint32 [prompts]; the answer with the highest reward, counted over all"""
    group_worst: np.ndarray
    """uint32 [prompts]; and the one with the lowest"""

    def __init__(self, handle: Handle, *, top: bool = False) -> None:
        super().__init__(handle, top=top)
        found = view("rrt_rollout_view")
        call(lib.rrt_result_rollout, handle.pointer, found)
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
        self.group_best = borrowed(found.group_best, groups, handle)
        self.group_worst = borrowed(found.group_worst, groups, handle)


class RolloutRequest:
    """An rrt_rollout_req, with all that it points to."""

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
        self.struct: Any = struct(
            "rrt_rollout_req", sample=sample.struct, advantage=one_of(_ADVANTAGE, advantage, "advantage")
        )
        if reference == "base":
            self.struct.flags |= lib.RRT_ROLLOUT_BASE_REFERENCE
        elif isinstance(reference, str):
            raise errors.ArgumentError(f"reference is {reference!r}, it must be a Model, 'base' or None")
        elif reference is not None:
            self._reference = reference._open()
            self.struct.reference = self._reference.pointer
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
            model, name = reward.model._open(), Bytes(reward.name)
            target.model, target.weight, target.label = model.pointer, reward.weight, reward.label
            target.name, target.name_len = name.pointer, name.length
            target.adapter = adapter_pointer(reward.adapter)
            self._kept += [model, name]
            if reward.rule is not None:
                rule = Bytes(reward.rule)
                target.rule, target.rule_len = rule.pointer, rule.length
                self._kept.append(rule)
        self.struct.rewards, self.struct.reward_count = self._rewards, len(rewards)
        self.struct.reward_stride = ffi.sizeof("rrt_reward")
