"""What callers give as prompts and texts, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import errors
from ._arrays import token_ids
from .tokenizer import Message, Tokenizer

Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
"""A text, token ids, or the messages of a conversation."""

Prompts = str | np.ndarray | Sequence[Prompt]
"""A list of prompts, or a single text; an array of ids has a row a prompt."""


def as_sequences(tokenizer: Any, prompts: Prompts, *, what: str, generation_prompt: bool) -> list[np.ndarray]:
    """Token ids of each prompt; ``tokenizer()`` is called if there is text. A single text is a list of one."""
    if isinstance(prompts, (str, bytes)):
        prompts = [prompts]  # type: ignore[list-item]
    if not len(prompts):
        raise errors.ArgumentError(f"{what}: there are none")
    return [_ids(tokenizer, prompt, f"{what}[{i}]", generation_prompt) for i, prompt in enumerate(prompts)]


def _ids(tokenizer: Any, prompt: Any, what: str, generation_prompt: bool) -> np.ndarray:
    if isinstance(prompt, str):
        text: Tokenizer = tokenizer()
        return text.encode(prompt)
    if _is_conversation(prompt):
        return tokenizer().chat(prompt, add_generation_prompt=generation_prompt)
    if isinstance(prompt, (int, np.integer)):
        name = what.split("[", 1)[0]
        raise errors.ArgumentError(f"{what} is a single id; {name} is a list of prompts, so write [[…]] for one of ids")
    return token_ids(prompt, what)


def conversations(prompts: Any) -> list[Sequence[Message]]:
    """The messages of each prompt, none for those that are no conversation; empty if none is one."""
    found = [p if _is_conversation(p) else () for p in prompts] if not isinstance(prompts, str) else []
    return found if any(found) else []


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
