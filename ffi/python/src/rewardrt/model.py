"""Models: sampling, log-probs, scores, new weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from . import errors
from ._arrays import Bytes, pointer
from ._handle import Children, Handle, call, nanoseconds, open_handle, struct, view
from ._inputs import Prompt, Prompts, as_sequences, conversations
from ._native import ffi, lib
from ._tensors import dtype_name
from .adapter import Adapter, config_text
from .events import Events
from .follower import Follower
from .job import Job, Live, News, SampleStream, submit
from .results import Logprobs, Samples, Scores, StepScores
from .rollout import Reward, Rollout, RolloutRequest
from .sampling import SampleRequest, Sampling
from .scoring import ScoreRequest, is_judge
from .session import Session
from .stats import Memory, Timing, numbers_of
from .tokenizer import Tokenizer
from .update import InFlight, Require, Update, in_flight_mode, one_of, update_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")

_PRECISION = {"auto": lib.RRT_PRECISION_AUTO, "f32": lib.RRT_PRECISION_F32}
_WEIGHTS = {"stored": lib.RRT_WEIGHTS_STORED, "int8": lib.RRT_WEIGHTS_INT8, "int4": lib.RRT_WEIGHTS_INT4}
_TAGS = {"weights": lib.RRT_SLEEP_WEIGHTS, "kv_cache": lib.RRT_SLEEP_KV_CACHE}
_HEADS = {
    lib.RRT_HEAD_LANGUAGE_MODEL: "language_model",
    lib.RRT_HEAD_SEQUENCE_CLASSIFICATION: "sequence_classification",
}


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, and the memory it takes."""

    head: str
    """"language_model" or "sequence_classification\""""
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    labels: int
    """0 for a language model"""
    has_tokenizer: bool
    has_chat_template: bool
    max_context: int
    kv_tokens: int
    bytes_allocated: int
    """Weights that are not mapped, KV cache, activations"""
    bytes_mapped: int
    """Weights used in place"""
    version: int
    """Of the weights"""
    architecture: str
    """"LlamaForCausalLM\""""
    eos_ids: tuple[int, ...]
    """The tokens that end a sequence"""
    pad_id: int | None
    asleep: tuple[str, ...]
    """What it has given back: "weights", "kv_cache\""""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the model: what an update brings under this name."""

    name: str
    dtype: str
    """"float32", "float16" or "bfloat16\""""
    shape: tuple[int, ...]


def load_model(
    runtime: Handle,
    path: str | os.PathLike[str],
    *,
    events: Events,
    precision: str,
    weights: str,
    mmap: bool,
    version: int,
    **numbers: int,
) -> Model:
    folder = Bytes(os.fspath(path))
    options = struct(
        "rrt_model_opts",
        path=folder.pointer,
        path_len=folder.length,
        precision=one_of(_PRECISION, precision, "precision"),
        weights=one_of(_WEIGHTS, weights, "weights"),
        flags=0 if mmap else lib.RRT_MODEL_NO_MMAP,
        weights_version=version,
        **numbers,
    )
    handle = open_handle("rrt_model", lib.rrt_model_load, lib.rrt_model_free, runtime, options, parent=runtime)
    return Model(handle, events, os.fspath(path))


class Model:
    """A model on a runtime, from :meth:`Runtime.load_model`. Any thread may use it."""

    def __init__(self, handle: Handle, events: Events, path: str) -> None:
        self._handle: Handle | None = handle
        self._events: Events | None = events
        self._tokenizer: Tokenizer | None = None
        self._children = Children()
        self.path = path

    @property
    def info(self) -> ModelInfo:
        """What it is, and what it takes now."""
        handle, found = self._open(), view("rrt_model_info")
        call(lib.rrt_get_model_info, handle, found)
        names = (
            "vocab_size",
            "hidden_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "labels",
            "max_context",
            "kv_tokens",
            "bytes_allocated",
            "bytes_mapped",
        )
        return ModelInfo(
            head=_HEADS[found.head],
            has_tokenizer=bool(found.has_tokenizer),
            has_chat_template=bool(found.has_chat_template),
            version=found.weights_version,
            architecture=ffi.buffer(found.architecture, found.architecture_len)[:].decode(),
            eos_ids=tuple(found.eos_ids[0 : found.eos_count]),
            pad_id=None if found.pad_id < 0 else found.pad_id,
            asleep=tuple(name for name, tag in _TAGS.items() if found.asleep & tag),
            **{name: getattr(found, name) for name in names},
        )

    @property
    def version(self) -> int:
        """Of its weights, now."""
        return self.info.version

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its folder; :class:`NotFound` if there is none."""
        self._open()
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.path)
        return self._tokenizer

    def tensors(self) -> list[TensorInfo]:
        """Its tensors in name order: what an update has to bring."""
        handle, found = self._open(), view("rrt_tensor_info")
        all_of_them: list[TensorInfo] = []
        while True:
            try:
                call(lib.rrt_model_tensor, handle, len(all_of_them), found)
            except errors.Error as error:
                if error.status == "RRT_E_RANGE":
                    return all_of_them
                raise
            name = ffi.buffer(found.name, found.name_len)[:].decode()
            all_of_them.append(TensorInfo(name, dtype_name(found.dtype), tuple(found.shape[0 : found.rank])))

    def sample(self, prompts: Prompts, **options: Unpack[Sampling]) -> Job[Samples]:
        """Samples ``n`` answers to each prompt: a job of ``len(prompts) * n`` answers.

            model.sample(prompts, n=8, max_tokens=256, temperature=0.7, top_p=0.9, seed=step)

        A prompt is a text (encoded with the tokenizer's own special-token rule), token ids, or messages (rendered
        through the chat template with the assistant's answer opened). The options are those of :class:`Sampling`.
        :class:`Full` if the queue is; nothing was queued then.
        """
        request = self._request(prompts, options)
        return self._job(lib.rrt_submit_sample, request, partial(Samples, top=bool(options.get("top_logprobs"))))

    def stream(self, prompts: Prompts, **options: Unpack[Sampling]) -> SampleStream:
        """As :meth:`sample`, with tokens that can be read as they are sampled: ``for chunk in stream`` or ``async
        for``."""
        request, news = self._request(prompts, options, stream=True), News()
        live = self._submit(lib.rrt_submit_sample, request, news=news)
        drawn = options.get("best_of") or options.get("n", 1)
        read = partial(Samples, top=bool(options.get("top_logprobs")))
        return self._tracked(SampleStream(live, read, news, drawn))

    def session(self, prompt: Prompt = ()) -> Session:
        """Begins a rollout of several turns."""
        ids = self._sequences([prompt], "prompt")[0] if len(prompt) else np.empty(0, np.uint32)
        handle = self._child(
            "rrt_session", lib.rrt_session_new, lib.rrt_session_free, pointer("uint32_t", ids), ids.size
        )
        return self._tracked(Session(handle, self))

    def rollout(
        self,
        prompts: Prompts,
        *,
        reference: Model | Literal["base"] | None = None,
        rewards: Sequence[Reward] = (),
        advantage: Literal["group", "leave_one_out", "batch", "centred", "none"] = "group",
        clip_reward: tuple[float, float] | None = None,
        **options: Unpack[Sampling],
    ) -> Job[Rollout]:
        """The data of one step of RL as one job: samples, log-probs of the reference and the KL to it, rewards,
        advantages.

        - ``reference``: whose log-probs the KL is against; "base" is this model without the adapter of ``options``.
        - ``rewards``: the models whose weighted sum is an answer's reward. One with another tokenizer sees prompts that
          are messages through its own chat template.
        - ``advantage``: "group" is TRL's GRPO, (r - mean) / (std + 1e-4) over a prompt's answers; "leave_one_out" is
          RLOO; "batch" is (r - mean) / (std + 1e-4) over all answers; "centred" is Dr. GRPO's r - mean over a prompt's
          answers; "none" is r.
        - ``clip_reward``: the range that the reward is brought into before.
        """
        request = RolloutRequest(
            self._request(prompts, options),
            conversations(prompts),
            reference=reference,
            rewards=rewards,
            advantage=advantage,
            clip_reward=clip_reward,
        )
        return self._job(lib.rrt_rollout, request, partial(Rollout, top=bool(options.get("top_logprobs"))))

    def logprobs(
        self,
        sequences: Prompts,
        *,
        prompt_lens: Sequence[int] | None = None,
        top_logprobs: int = 0,
        adapter: Adapter | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Job[Logprobs]:
        """Computes ln p of each token at temperature 1, given those before it in its sequence, and the entropy.

        ``prompt_lens`` [sequences]: leading tokens that are not scored; without it all are, and the first of each is
        NaN. ``top_logprobs``: report so many of the most likely tokens at each place. Tokens × vocabulary is never held
        in memory.
        """
        request = ScoreRequest(
            lib.RRT_SCORE_LOGPROBS,
            self._open(),
            self._sequences(sequences, "sequences", opened=False),
            prompt_lens=prompt_lens,
            adapter=adapter,
            priority=priority,
            deadline=deadline,
            top_logprobs=top_logprobs,
        )
        return self._job(lib.rrt_submit_score, request, partial(Logprobs, top=top_logprobs > 0))

    def score(
        self,
        sequences: Prompts,
        *,
        rule: str | None = None,
        label: int = 0,
        adapter: Adapter | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Job[Scores]:
        """Scores sequences by the checkpoint's head, or by ``rule``.

        "sequence": the logits of a sequence classifier. "judge:LABEL,LABEL": the probabilities of labels of one token
        each as the next token, one against the other. Messages end with the opening of the answer for a judge,
        and without it for a classifier. ``label`` says which value is a sequence's ``score``.
        """
        request = ScoreRequest(
            lib.RRT_SCORE_REWARD,
            self._open(),
            self._sequences(sequences, "sequences", opened=is_judge(rule)),
            rule=rule,
            label=label,
            adapter=adapter,
            priority=priority,
            deadline=deadline,
        )
        return self._job(lib.rrt_submit_score, request, Scores)

    def score_steps(
        self,
        sequences: Prompts,
        *,
        step_id: int | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        prompt_lens: Sequence[int] | None = None,
        rule: str | None = None,
        label: int = 0,
        adapter: Adapter | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Job[StepScores]:
        """Reads the rule at chosen tokens of each sequence: process rewards.

        They are read after every token ``step_id`` beyond ``prompt_lens``, or after ``positions`` [sequences], rising
        and counted from a sequence's first token.
        """
        if (step_id is None) == (positions is None):
            raise errors.ArgumentError("steps end at a step_id or at positions: one of them is needed, and not both")
        request = ScoreRequest(
            lib.RRT_SCORE_STEP_REWARDS,
            self._open(),
            self._sequences(sequences, "sequences", opened=False),
            rule=rule,
            label=label,
            step_id=step_id or 0,
            positions=positions,
            prompt_lens=prompt_lens,
            adapter=adapter,
            priority=priority,
            deadline=deadline,
        )
        return self._job(lib.rrt_submit_score, request, StepScores)

    def update(
        self,
        version: int | None = None,
        *,
        storage: Literal["shadow", "in_place"] = "shadow",
        in_flight: InFlight = "wait",
        require: Require = "all",
        expect_version: int | None = None,
        check_finite: bool = False,
        convert: bool = False,
        timeout: float | None = None,
    ) -> Update:
        """Begins a change of weights, which leaving the ``with`` block commits, and an exception in it aborts.

            with model.update(version=7) as update:
                for name, tensor in policy.state_dict().items():
                    update.put(name, tensor)

        - ``version``: the new weights' name; without it the present one + 1, or what a delta leads to.
        - ``storage``: "shadow" serves the old weights until the commit, and after a failed one. "in_place" needs no
          room for a second copy; the model computes nothing meanwhile, and has no valid weights after a failure until
          an update with all tensors is committed.
        - ``in_flight``: sequences under way finish on the old weights ("wait", at most ``timeout`` seconds), end with
          what they have ("cancel"), or go on with the new ones ("keep": ``spans`` of a result says which tokens are
          whose).
        - ``require``: "all" tensors must come, or a "subset" and the others stay.
        - ``expect_version``: :class:`Conflict` if the model has another one.
        - ``check_finite`` refuses NaN and infinities; ``convert`` rounds tensors of another dtype to the model's.
        """
        options = update_options(
            storage=storage,
            in_flight=in_flight,
            require=require,
            expect_version=expect_version,
            check_finite=check_finite,
            convert=convert,
            timeout=timeout,
        )
        handle = self._child("rrt_update", lib.rrt_update_begin, lib.rrt_update_free, options)
        return self._tracked(Update(handle, self.version, version))

    def load_adapter(self, path: str | os.PathLike[str], *, version: int = 0, mmap: bool = True) -> Adapter:
        """Loads a LoRA adapter that PEFT saved beside the weights, which it neither copies nor changes.

        Requests choose it, or another, or none; all of them share steps.
        """
        folder = Bytes(os.fspath(path))
        options = struct(
            "rrt_adapter_opts",
            path=folder.pointer,
            path_len=folder.length,
            version=version,
            flags=0 if mmap else lib.RRT_ADAPTER_NO_MMAP,
        )
        handle = self._child("rrt_adapter", lib.rrt_adapter_load, lib.rrt_adapter_free, options)
        return self._tracked(Adapter(handle))

    def adapter_from_config(self, config: Any, *, version: int = 0) -> Adapter:
        """Makes the LoRA adapter that a PEFT config describes: a ``peft.LoraConfig``, a mapping, or the JSON of
        adapter_config.json. All its values are zero, so that it changes nothing, until :meth:`Adapter.update` brings others.
        """
        text = Bytes(config_text(config))
        options = struct("rrt_adapter_opts", config=text.pointer, config_len=text.length, version=version)
        handle = self._child("rrt_adapter", lib.rrt_adapter_load, lib.rrt_adapter_free, options)
        return self._tracked(Adapter(handle))

    def follow(self, path: str | os.PathLike[str], *, interval: float = 0.2, in_flight: InFlight = "wait") -> Follower:
        """Keeps the model at the newest weights of a folder: of its subfolders step_N, checkpoints or deltas, the one
        with the largest N above the model's version becomes its weights, with version N. They must appear whole, by a
        rename."""
        folder, update = Bytes(os.fspath(path)), update_options(in_flight=in_flight)
        options = struct("rrt_follow_opts", interval_ns=nanoseconds(interval), update=update)
        handle = self._child(
            "rrt_follower", lib.rrt_follow, lib.rrt_follower_free, folder.pointer, folder.length, options
        )
        return self._tracked(Follower(handle))

    def memory(self) -> Memory:
        """Bytes that it holds now."""
        return numbers_of(Memory, "rrt_memory", lib.rrt_model_memory, self._open())

    def timing(self) -> Timing:
        """What was done since it was loaded, or since :meth:`Runtime.reset_stats`, and what is going on."""
        return numbers_of(Timing, "rrt_timing", lib.rrt_model_timing, self._open())

    def sleep(
        self, *, weights: bool = True, kv_cache: bool = True, in_flight: InFlight = "wait", timeout: float | None = None
    ) -> None:
        """Gives memory back until :meth:`wake`: the device's weights (the checkpoint's bytes stay, mapped or in host
        memory), the KV cache, or both. Jobs may be submitted, and wait."""
        call(
            lib.rrt_model_sleep,
            self._open(),
            _tags(weights, kv_cache),
            in_flight_mode(in_flight),
            nanoseconds(timeout),
        )

    def wake(self, *, weights: bool = True, kv_cache: bool = True) -> None:
        """Takes the memory again. On an error the model sleeps on."""
        call(lib.rrt_model_wake, self._open(), _tags(weights, kv_cache))

    def close(self) -> None:
        """Closes it with its adapters, sessions, updates and followers; jobs of it that are not done fail with
        :class:`Cancelled`."""
        self._children.close()
        self._handle = self._events = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompts: Any, options: Sampling, *, stream: bool = False) -> SampleRequest:
        return SampleRequest(self._open(), self._sequences(prompts, "prompts"), options, stream=stream)

    def _sequences(self, given: Any, what: str, *, opened: bool = True) -> list[np.ndarray]:
        return as_sequences(lambda: self.tokenizer, given, what=what, generation_prompt=opened)

    def _job(self, function: Any, request: Any, read: Callable[[Handle], Any]) -> Job[Any]:
        return self._tracked(Job(self._submit(function, request), read))

    def _submit(self, function: Any, request: Any, news: News | None = None) -> Live:
        runtime = self._open().parent
        assert runtime is not None
        return self._submit_by(function, runtime, request, news)

    def _submit_by(self, function: Any, owner: Handle, request: Any, news: News | None = None) -> Live:
        """Queues a request by a function of the runtime or of a session."""
        model, events = self._open(), self._events
        if events is None:
            raise errors.Closed("the model is closed")
        return submit(function, owner, request, model=model, events=events, news=news)

    def _child(self, kind: str, function: Any, free: Any, *arguments: Any) -> Handle:
        """Opens something of this model, which keeps the runtime."""
        handle = self._open()
        return open_handle(kind, function, free, handle, *arguments, parent=handle.parent)

    def _tracked(self, child: T) -> T:
        """Closes it with the model."""
        return self._children.add(child)

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the model is closed")
        return self._handle


def _tags(weights: bool, kv_cache: bool) -> int:
    return (_TAGS["weights"] if weights else 0) | (_TAGS["kv_cache"] if kv_cache else 0)
