"""Models: sampling, log-probs, scores, new weights."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import errors
from ._arrays import Bytes, Packed, Strings, numbers, pointer, token_ids
from ._handle import Handle, call, nanoseconds, open_handle, struct, view
from ._inputs import Prompt, as_sequences
from ._native import ffi, lib
from ._tensors import dtype_name
from .adapter import Adapter
from .job import Job
from .results import Logprobs, Samples, Scores
from .tokenizer import Tokenizer
from .update import InFlight, Update, in_flight_mode, one_of, update_options

_PRECISION = {"auto": lib.RRT_PRECISION_AUTO, "f32": lib.RRT_PRECISION_F32}
_WEIGHTS = {"stored": lib.RRT_WEIGHTS_STORED, "int8": lib.RRT_WEIGHTS_INT8, "int4": lib.RRT_WEIGHTS_INT4}
_HEADS = {lib.RRT_HEAD_LANGUAGE_MODEL: "language_model", lib.RRT_HEAD_SEQUENCE_CLASSIFICATION: "sequence_classification"}


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


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the model: what an update brings under this name."""

    name: str
    dtype: str
    """"float32", "float16" or "bfloat16\""""
    shape: tuple[int, ...]


def load_model(runtime: Handle, path: str | os.PathLike[str], *, precision: str, weights: str, mmap: bool, version: int,
               **numbers: int) -> Model:
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
    handle = open_handle("rrt_model", lib.rrt_model_load, lib.rrt_model_free, runtime.pointer, options, parent=runtime)
    return Model(handle, runtime, os.fspath(path))


class Model:
    """A model on a runtime, from :meth:`Runtime.load_model`. Any thread may use it."""

    def __init__(self, handle: Handle, runtime: Handle, path: str) -> None:
        self._handle: Handle | None = handle
        self._runtime = runtime
        self._tokenizer: Tokenizer | None = None
        self._children: weakref.WeakSet[Any] = weakref.WeakSet()
        self.path = path

    @property
    def info(self) -> ModelInfo:
        """What it is, and what it takes now."""
        found = view("rrt_model_info")
        call(lib.rrt_get_model_info, self._open().pointer, found)
        names = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "labels", "max_context",
                 "kv_tokens", "bytes_allocated", "bytes_mapped")  # fmt: skip
        return ModelInfo(
            head=_HEADS[found.head],
            has_tokenizer=bool(found.has_tokenizer),
            has_chat_template=bool(found.has_chat_template),
            version=found.weights_version,
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
        handle, found, all_of_them = self._open(), view("rrt_tensor_info"), []
        while True:
            try:
                call(lib.rrt_model_tensor, handle.pointer, len(all_of_them), found)
            except errors.Error as error:
                if error.status == "RRT_E_RANGE":
                    return all_of_them
                raise
            name = ffi.buffer(found.name, found.name_len)[:].decode()
            all_of_them.append(TensorInfo(name, dtype_name(found.dtype), tuple(found.shape[0 : found.rank])))

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        streams: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        adapter: Adapter | None = None,
    ) -> Job[Samples]:
        """Samples ``n`` answers to each prompt: a job of ``len(prompts) * n`` answers.

        A prompt is a text (encoded with the tokenizer's own special-token rule), token ids, or messages (rendered through
        the chat template with the assistant's answer opened).

        - ``max_tokens``: of an answer; fewer if the model's context ends first.
        - ``temperature``: 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 are off.
        - ``seed``, ``streams`` [prompts]: (seed, stream, sample, position) names a draw, whatever else is computed at the time;
          without ``streams`` a prompt's stream is its index.
        - ``stop``: strings that end an answer; its text is cut there. ``stop_ids``: besides the model's own.

        :class:`Full` if the queue is; nothing was queued then.
        """
        model = self._open()
        packed = Packed(as_sequences(lambda: self.tokenizer, prompts, what="prompts", generation_prompt=True))
        # What the request points to has to live until the call at the end has copied it.
        stops = Strings([stop] if isinstance(stop, str) else stop)
        ids = token_ids(stop_ids, "stop_ids")
        request = struct(
            "rrt_sample_req",
            flags=lib.RRT_SAMPLE_IGNORE_EOS if ignore_eos else 0,
            model=model.pointer,
            seed=seed,
            n_samples=n,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_ids=pointer("uint32_t", ids),
            stop_id_count=ids.size,
            stop_text=stops.pointer,
            stop_offsets=pointer("size_t", stops.offsets),
            stop_count=stops.count,
            adapter=_pointer(adapter),
        )
        packed.write(request.prompts)
        if streams is not None:
            chosen = numbers(streams, "uint64", "streams", packed.count)
            request.streams = pointer("uint64_t", chosen)
        return self._submit(model, lib.rrt_submit_sample, request, Samples)

    def logprobs(
        self,
        sequences: Prompt | Sequence[Prompt],
        *,
        prompt_lens: Sequence[int] | None = None,
        adapter: Adapter | None = None,
    ) -> Job[Logprobs]:
        """Computes ln p of each token at temperature 1, given those before it in its sequence.

        ``prompt_lens`` [sequences]: leading tokens that are not scored; without it all are, and the first of each is NaN.
        Tokens × vocabulary is never held in memory.
        """
        return self._score(sequences, lib.RRT_SCORE_LOGPROBS, Logprobs, adapter, prompt_lens=prompt_lens)

    def score(
        self,
        sequences: Prompt | Sequence[Prompt],
        *,
        rule: str | None = None,
        adapter: Adapter | None = None,
    ) -> Job[Scores]:
        """Scores sequences by the checkpoint's head, or by ``rule``.

        "sequence": the logits of a sequence classifier. "judge:LABEL,LABEL": the probabilities of labels of one token each
        as the next token, one against the other. Messages end with the opening of the assistant's answer for a judge, and
        without it for a classifier.
        """
        return self._score(sequences, lib.RRT_SCORE_REWARD, Scores, adapter, rule=rule)

    def update(
        self,
        version: int | None = None,
        *,
        storage: Literal["shadow", "in_place"] = "shadow",
        in_flight: InFlight = "wait",
        require: Literal["all", "subset"] = "all",
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
        - ``storage``: "shadow" serves the old weights until the commit, and after a failed one. "in_place" needs no room for a
          second copy; the model computes nothing meanwhile, and has no valid weights after a failure until an update with all
          tensors is committed.
        - ``in_flight``: sequences under way finish on the old weights ("wait", at most ``timeout`` seconds), end with what they have
          ("cancel"), or go on with the new ones ("keep": ``spans`` of a result says which tokens are whose).
        - ``require``: "all" tensors must come, or a "subset" and the others stay.
        - ``expect_version``: :class:`Conflict` if the model has another one.
        - ``check_finite`` refuses NaN and infinities; ``convert`` rounds tensors of another dtype to the model's.
        """
        options = update_options(storage=storage, in_flight=in_flight, require=require, expect_version=expect_version,
                                 check_finite=check_finite, convert=convert, timeout=timeout)  # fmt: skip
        handle = open_handle("rrt_update", lib.rrt_update_begin, lib.rrt_update_free, self._open().pointer, options,
                             parent=self._runtime)  # fmt: skip
        update = Update(handle, self.version, version)
        self._children.add(update)
        return update

    def load_adapter(self, path: str | os.PathLike[str], *, version: int = 0, mmap: bool = True) -> Adapter:
        """Loads a LoRA adapter that PEFT saved beside the weights, which it neither copies nor changes.

        Requests choose it, or another, or none; all of them share steps.
        """
        folder = Bytes(os.fspath(path))
        options = struct("rrt_adapter_opts", path=folder.pointer, path_len=folder.length, version=version,
                         flags=0 if mmap else lib.RRT_ADAPTER_NO_MMAP)  # fmt: skip
        handle = open_handle("rrt_adapter", lib.rrt_adapter_load, lib.rrt_adapter_free, self._open().pointer, options,
                             parent=self._runtime)  # fmt: skip
        adapter = Adapter(handle)
        self._children.add(adapter)
        return adapter

    def sleep(self, *, weights: bool = True, kv_cache: bool = True, in_flight: InFlight = "wait",
              timeout: float | None = None) -> None:
        """Gives memory back until :meth:`wake`: the device's weights (the checkpoint's bytes stay, mapped or in host memory), the
        KV cache, or both. Jobs may be submitted, and wait."""
        call(lib.rrt_model_sleep, self._open().pointer, _tags(weights, kv_cache), in_flight_mode(in_flight), nanoseconds(timeout))

    def wake(self, *, weights: bool = True, kv_cache: bool = True) -> None:
        """Takes the memory again. On an error the model sleeps on."""
        call(lib.rrt_model_wake, self._open().pointer, _tags(weights, kv_cache))

    def close(self) -> None:
        """Closes it with its adapters and updates; jobs of it that are not done fail with :class:`Cancelled`."""
        for child in list(self._children):
            child.close()
        self._handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, given: Any, kind: int, read: Any, adapter: Adapter | None, *, rule: str | None = None,
               prompt_lens: Sequence[int] | None = None) -> Job[Any]:
        model = self._open()
        judge = rule is not None and rule.startswith("judge")
        packed = Packed(as_sequences(lambda: self.tokenizer, given, what="sequences", generation_prompt=judge))
        request = struct("rrt_score_req", model=model.pointer, kind=kind, adapter=_pointer(adapter))
        packed.write(request.sequences)
        if prompt_lens is not None:
            lengths = numbers(prompt_lens, "uintp", "prompt_lens", packed.count)
            request.prompt_lens = pointer("size_t", lengths)
        if rule is not None:
            text = Bytes(rule)
            request.rule, request.rule_len = text.pointer, text.length
        return self._submit(model, lib.rrt_submit_score, request, read)

    def _submit(self, model: Handle, function: Any, request: Any, read: Any) -> Job[Any]:
        number = ffi.new("uint64_t *")
        call(function, self._runtime.pointer, request, number)
        job = Job(self._runtime, model, number[0], read)
        self._children.add(job)
        return job

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the model is closed")
        return self._handle


def _pointer(adapter: Adapter | None) -> Any:
    return ffi.NULL if adapter is None else adapter._open().pointer


def _tags(weights: bool, kv_cache: bool) -> int:
    return (lib.RRT_SLEEP_WEIGHTS if weights else 0) | (lib.RRT_SLEEP_KV_CACHE if kv_cache else 0)
