"""Text to ids and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import errors
from ._arrays import Bytes, pointer, token_ids
from ._handle import Handle, call, open_handle
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

        ``add_special`` adds what the tokenizer adds by itself, BOS for instance. ``parse_special`` lets special tokens in
        the text count; without it a text cannot forge them.
        """
        flags = (lib.RRT_ADD_SPECIAL if add_special else 0) | (lib.RRT_PARSE_SPECIAL if parse_special else 0)
        data = Bytes(text)
        return self._ids(len(data.data) + 16, lib.rrt_encode, data.pointer, data.length, flags)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """The text of ids; incomplete UTF-8 becomes U+FFFD."""
        array = token_ids(ids, "ids")
        flags = lib.RRT_SKIP_SPECIAL if skip_special else 0
        source = pointer("uint32_t", array)
        need = ffi.new("size_t *")

        def write(text: Any, capacity: int) -> None:
            call(lib.rrt_decode, self._open().pointer, source, array.size, flags, text, capacity, need)

        return bytes(_filled("char", array.size * 8 + 64, need, write)).decode("utf-8")

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> np.ndarray:
        """The ids of a conversation through the chat template, uint32 [tokens].

        ``add_generation_prompt`` opens the assistant's answer. Special tokens count in the template, not in the messages.
        """
        turns = ffi.new("rrt_message[]", len(messages))
        kept = []
        for turn, message in zip(turns, messages, strict=True):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise errors.ArgumentError(f"a message needs the text {key!r}, it is {dict(message)!r:.80}")
                data = Bytes(message[key])
                kept.append(data)
                setattr(turn, key, data.pointer)
                setattr(turn, f"{key}_len", data.length)
        flags = lib.RRT_ADD_GENERATION_PROMPT if add_generation_prompt else 0
        size = sum(data.length for data in kept) + 256
        return self._ids(size, lib.rrt_chat_encode, turns, len(messages), ffi.sizeof("rrt_message"), flags)

    def close(self) -> None:
        """Frees it; more calls do nothing."""
        self._handle = None

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, guess: int, function: Callable[..., int], *arguments: Any) -> np.ndarray:
        need = ffi.new("size_t *")

        def write(ids: Any, capacity: int) -> None:
            call(function, self._open().pointer, *arguments, ids, capacity, need)

        return np.frombuffer(_filled("uint32_t", guess, need, write), np.uint32)

    def _open(self) -> Handle:
        if self._handle is None:
            raise errors.Closed("the tokenizer is closed")
        return self._handle


def _filled(c_type: str, guess: int, need: Any, write: Callable[[Any, int], None]) -> Any:
    """A buffer of what ``write`` gives: once with a guessed capacity, and again with the one that it asks for."""
    capacity = guess
    while True:
        target = ffi.new(f"{c_type}[]", max(capacity, 1))
        try:
            write(target, capacity)
        except errors.Error as error:
            if error.status != "RRT_E_SHORT_BUFFER":
                raise
            capacity = need[0]
        else:
            return ffi.buffer(target, need[0] * ffi.sizeof(c_type))
