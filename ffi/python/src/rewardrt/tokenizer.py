"""Text to ids and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import errors
from ._arrays import Bytes, pointer, token_ids
from ._handle import Handle, call, filled, open_handle
from ._native import ffi, lib

Message = Mapping[str, str]
"""A turn of a conversation: ``{"role": "user", "content": "…"}``."""


class Tokenizer:
    """tokenizer.json of a model folder, and its chat template. Needs no device, and any thread may use it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder = Bytes(os.fspath(path))
        self._handle: Handle | None = open_handle(
            "rrt_tokenizer", lib.rrt_tokenizer_load, lib.rrt_tokenizer_free, folder.pointer, folder.length
        )

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> np.ndarray:
        """The ids of a text, uint32 [tokens].

        ``add_special`` adds what the tokenizer adds by itself, BOS for instance. ``parse_special`` lets special tokens
        in the text count; without it a text cannot forge them.
        """
        flags = (lib.RRT_ADD_SPECIAL if add_special else 0) | (lib.RRT_PARSE_SPECIAL if parse_special else 0)
        data = Bytes(text)
        return self._ids(len(data.data) + 16, lib.rrt_encode, data.pointer, data.length, flags)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """The text of ids; incomplete UTF-8 becomes U+FFFD."""
        array = token_ids(ids, "ids")
        flags = lib.RRT_SKIP_SPECIAL if skip_special else 0
        source = pointer("uint32_t", array)
        return self._text(array.size * 8 + 64, lib.rrt_decode, source, array.size, flags)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> np.ndarray:
        """The ids of a conversation through the chat template, uint32 [tokens].

        ``add_generation_prompt`` opens the assistant's answer. Special tokens count in the template, not in the
        messages.
        """
        turns = Turns(messages)
        return self._ids(turns.bytes + 256, lib.rrt_chat_encode, *turns.arguments, _opened(add_generation_prompt))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The same as text."""
        turns = Turns(messages)
        return self._text(turns.bytes + 256, lib.rrt_chat_render, *turns.arguments, _opened(add_generation_prompt))

    def close(self) -> None:
        """Frees it; more calls do nothing."""
        self._handle = None

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, guess: int, function: Callable[..., int], *arguments: Any) -> np.ndarray:
        handle = self._open()
        return np.frombuffer(
            filled("uint32_t", guess, lambda *out: call(function, handle, *arguments, *out)), np.uint32
        )

    def _text(self, guess: int, function: Callable[..., int], *arguments: Any) -> str:
        handle = self._open()
        return bytes(filled("char", guess, lambda *out: call(function, handle, *arguments, *out))).decode("utf-8")

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the tokenizer is closed")
        return self._handle


def _opened(add_generation_prompt: bool) -> int:
    return lib.RRT_ADD_GENERATION_PROMPT if add_generation_prompt else 0


class Turns:
    """Messages as the library takes them; keeps what they point to."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.turns = ffi.new("rrt_message[]", len(messages))
        self._texts = []
        for turn, message in zip(self.turns, messages, strict=True):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise errors.ArgumentError(f"a message needs the text {key!r}, it is {dict(message)!r:.80}")
                text = Bytes(message[key])
                self._texts.append(text)
                setattr(turn, key, text.pointer)
                setattr(turn, f"{key}_len", text.length)

    @property
    def bytes(self) -> int:
        return sum(text.length for text in self._texts)

    @property
    def arguments(self) -> tuple[Any, int, int]:
        """(array, count, stride)"""
        return self.turns, len(self.turns), ffi.sizeof("rrt_message")
