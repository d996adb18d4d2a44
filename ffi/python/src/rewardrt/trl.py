"""TRL: sampling for GRPOTrainer by rewardrt, and reward functions backed by a loaded reward model.

    policy = rewardrt.trl.load_policy(runtime, model, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[rewardrt.trl.reward_func(runtime.load_model("path/to/reward-model"))],
        rollout_func=rewardrt.trl.rollout_func(policy),
        ...
    )

Neither torch nor trl is imported here: what they give is used as it comes.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from . import errors
from .model import Model
from .runtime import Runtime

# A stream names the draws of one answer: 1 bit for evaluation, 23 of place in the batch, 16 of process, 24 of training
# step. The step is above all others.
_PLACE_BITS, _PROCESS_BITS = 23, 16


def load_policy(runtime: Runtime, model: Any, tokenizer: Any = None, **options: Any) -> Model:
    """Loads a transformers model that is in memory, in the dtype of its parameters.

    The runtime's model then has the same dtype as the one that is trained, so that no update rounds anything.
    ``options`` are those of :meth:`Runtime.load_model`; precision is "f32" unless they say otherwise, the arithmetic of
    torch's own products.
    """
    with tempfile.TemporaryDirectory(prefix="rewardrt-policy-") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # The folder goes, so its files are read and not mapped, and the tokenizer now and not when it is asked for.
        policy = runtime.load_model(folder, **{"precision": "f32", **options, "mmap": False})
        if policy.info.has_tokenizer:
            _ = policy.tokenizer
        return policy


def rollout_func(policy: Model, *, in_flight: str = "wait") -> Callable[[list[Any], Any], dict[str, Any]]:
    """A ``rollout_func`` for GRPOTrainer that samples from ``policy``.

    It returns, an entry a prompt, ``prompt_ids``, ``completion_ids`` and ``logprobs`` (ln p of each token in the
    distribution that it was drawn from). Prompts are tokenized as TRL does it, by the trainer's tokenizer and chat
    template; how is sampled is taken from the trainer's arguments. Before a rollout for training the trainer's weights
    are pushed, as one transaction; before one for evaluation too, unless the step is that of the last push and torch
    has counted no write to a parameter since.

    An answer's draws depend on ``args.seed``, the step, the process, the place of its prompt in the step's batches, and
    whether it is for evaluation, alone. A run that is resumed draws as the undisturbed one from the next rollout on; it
    samples the same where its weights and prompts are the same, and where no step after the checkpoint was to learn
    from a rollout before it, which TRL does not save.

    Each process of a distributed run has its own runtime. Parameters that are sharded over processes (FSDP, ZeRO-3) are
    refused.
    """
    state = _Pushed()

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = bool(trainer.model.training)
        present = state.is_present(policy, trainer, model)
        if not present:
            state.answers = {True: 0, False: 0}
        # Fused optimizers write without torch counting it, so that only an evaluation can do without a push.
        if training or not present:
            push(policy, model, in_flight=in_flight)
            state.set(policy, trainer, model)
        prompt_ids = _tokenized(prompts, trainer)
        streams = _streams(trainer, training, state.answers[training], len(prompts))
        state.answers[training] += len(prompts)
        samples = policy.sample(prompt_ids, streams=streams, **_sampling(trainer)).result()
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [s.ids.tolist() for s in samples],
            "logprobs": [s.logprobs.tolist() for s in samples],
        }

    return rollout


def push(policy: Model, model: Any, *, in_flight: str = "wait") -> int:
    """Puts a transformers (or PEFT) model's parameters into ``policy``, and returns the new version.

    All or nothing: a tensor that is missing, unknown or of another shape or dtype is :class:`ShapeError` or
    :class:`NotFound`, and the old weights serve on. Tied parameters, which have several names, count once.
    """
    known = {t.name for t in policy.tensors()}
    with policy.update(in_flight=in_flight) as update:  # type: ignore[arg-type]
        put: set[int] = set()
        later = []
        for name, parameter in _parameters(model):
            if name in known:
                update.put(name, parameter if parameter.device.type == "cpu" else parameter.cpu())
                put.add(parameter.data_ptr())
            else:
                later.append((name, parameter))
        for name, parameter in later:
            if parameter.data_ptr() not in put:
                raise errors.NotFound(f"the policy has no tensor {name!r}, and it is not tied to one that it has")
        return update.commit()


class _Pushed:
    """Whose weights of which step the policy has, and how many answers were sampled from them, for training and not."""

    def __init__(self) -> None:
        self._trainer: Callable[[], Any] = lambda: None
        self._written: Any = None
        self.answers = {True: 0, False: 0}

    def is_present(self, policy: Model, trainer: Any, model: Any) -> bool:
        return self._trainer() is trainer and self._written == _written(policy, trainer, model)

    def set(self, policy: Model, trainer: Any, model: Any) -> None:
        self._trainer, self._written = weakref.ref(trainer), _written(policy, trainer, model)


def _written(policy: Model, trainer: Any, model: Any) -> Any:
    """Changes with the trainer's step, and when the policy or a parameter is written to, but for what torch does not
    count: fused optimizers, and writes through ``.data``."""
    writes = [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
    return policy.version, trainer.state.global_step, writes


def _parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """(name as in the checkpoint, tensor), with all names of tied ones."""
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            yield name, parameter.detach()
        return
    model.merge_adapter()
    try:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if model.prefix in name or "original_module" in name:
                continue
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield name.replace("modules_to_save.default.", ""), parameter.detach()
    finally:
        model.unmerge_adapter()


def _tokenized(prompts: list[Any], trainer: Any) -> list[list[int]]:
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"]
    for prompt in prompts:
        for message in prompt:
            if not isinstance(message["content"], str):
                raise errors.Unsupported(
                    f"a message's content is {type(message['content']).__name__}, only text is supported"
                )
    encoded = tokenizer.apply_chat_template(
        conversation=prompts,
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return encoded["input_ids"]


def _streams(trainer: Any, training: bool, first: int, count: int) -> list[int]:
    process = trainer.accelerator.process_index
    if first + count > 1 << _PLACE_BITS or process >= 1 << _PROCESS_BITS:
        raise errors.LimitError(f"{first + count} answers from one step's weights in process {process} are too many")
    base = (trainer.state.global_step << _PROCESS_BITS | process) << 1 | (not training)
    return [base << _PLACE_BITS | place for place in range(first, first + count)]


def _sampling(trainer: Any) -> dict[str, Any]:
    """The trainer's arguments in the runtime's words."""
    if trainer.args.generation_kwargs:
        raise errors.Unsupported(
            f"generation_kwargs {sorted(trainer.args.generation_kwargs)} are those of another engine"
        )
    return {
        "max_tokens": trainer.max_completion_length,
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k or 0,
        "min_p": trainer.min_p or 0.0,
        "repetition_penalty": trainer.repetition_penalty,
        "seed": trainer.args.seed,
        "stop_ids": trainer.eos_token_ids,
    }


def reward_func(
    model: Model, *, name: str | None = None, rule: str | None = None, label: int = 0
) -> Callable[..., list[float | None]]:
    """A reward function for TRL's trainers that scores by ``model``.

    Conversations go through the reward model's own chat template, texts through its tokenizer as TRL does it: prompt
    and completion in one, special tokens in them count, none are added. ``rule`` as in :meth:`Model.score`; ``label``
    says which of its values is the reward. An answer that is longer than the model's context, and one whose value is
    not finite, is None: TRL gives it no advantage. ``name`` is what TRL logs it under; without it the model folder's.
    """
    longest = model.info.max_context

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
        ids = [_scored_ids(model, rule, p, c) for p, c in zip(prompts, completions, strict=True)]
        fits = [i for i, sequence in enumerate(ids) if len(sequence) <= longest]
        rewards: list[float | None] = [None] * len(ids)
        if fits:
            for i, value in zip(fits, _finite_scores(model, [ids[i] for i in fits], rule, label), strict=True):
                rewards[i] = value
        return rewards

    reward.__name__ = name or os.path.basename(os.path.normpath(model.path))
    return reward


def _finite_scores(model: Model, sequences: list[Any], rule: str | None, label: int) -> list[float | None]:
    """The scores; None where one is not finite."""
    try:
        return model.score(sequences, rule=rule, label=label).result().score.tolist()
    except errors.NonFinite:
        if len(sequences) == 1:
            return [None]
    # One of them fails the job of all: each gets its own.
    return [value for sequence in sequences for value in _finite_scores(model, [sequence], rule, label)]


def _scored_ids(model: Model, rule: str | None, prompt: Any, completion: Any) -> Any:
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt + completion, add_special=False, parse_special=True)
    judged = rule is not None and rule.startswith("judge")
    return model.tokenizer.chat([*prompt, *completion], add_generation_prompt=judged)
