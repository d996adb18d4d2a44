"""Numbers: memory, and what work was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from ._handle import Handle, call, view

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """Bytes that are held now."""

    models: int
    allocated: int
    """The sum of weights, kv_cache, scratch, host and adapters"""
    mapped: int
    """Weights used in place in mapped files"""
    weights: int
    """In allocated memory of the device"""
    kv_cache: int
    scratch: int
    """Activations and logits"""
    host: int
    """Weights in host memory beside those of a GPU"""
    adapters: int
    budget: int
    """What may be allocated; 2^64 - 1 is no bound"""


@dataclass(frozen=True)
class Timing:
    """What was done, and what is going on now. A row is one position of one sequence going through the model once."""

    steps: int
    step_ns: int
    """Time spent in steps, scheduling included"""
    prefill_rows: int
    """Of prompts and of texts that are scored"""
    decode_rows: int
    """Of sampled tokens"""
    drafted_rows: int
    """Of guessed tokens"""
    accepted_rows: int
    """… which were right"""
    recomputed_rows: int
    """Computed before, and again after making room"""
    cached_rows: int
    """Not computed, the cache had them"""
    sampled_tokens: int
    preemptions: int
    """Times a sequence had to make room"""
    longest_wait_ns: int
    """Of a sequence, between submission and its first step"""
    kv_evictions: int
    """Blocks of 16 positions whose content was given up for another one's"""
    kv_copies: int
    submitted: int
    """Jobs; of the runtime alone, as the next one"""
    refused: int
    """Jobs, because the queue was full"""
    jobs: int
    """Now: not done"""
    running: int
    """Now: sequences that take part in steps"""
    waiting: int
    """Now: sequences that wait for their turn"""
    queued_tokens: int
    """Now: positions that the jobs can come to; of the runtime alone"""
    kv_blocks: int
    """Now: blocks of 16 positions in all"""
    kv_used: int
    """Now: of sequences"""
    kv_cached: int
    """Now: kept for whoever begins with the same tokens"""


@dataclass(frozen=True)
class JobTiming:
    """What a job has cost; rows as in :class:`Timing`."""

    queued_ns: int
    """Until its first sequence began"""
    elapsed_ns: int
    """From submission until it was done"""
    prefill_rows: int
    decode_rows: int
    drafted_rows: int
    accepted_rows: int
    recomputed_rows: int
    cached_rows: int
    sampled_tokens: int
    preemptions: int


def numbers_of(kind: type[T], struct: str, function: Callable[..., int], handle: Handle) -> T:
    """A dataclass of the numbers that a struct of the library has under the same names."""
    found = view(struct)
    call(function, handle, found)
    return kind(**{field.name: getattr(found, field.name) for field in fields(kind)})  # type: ignore[arg-type]
