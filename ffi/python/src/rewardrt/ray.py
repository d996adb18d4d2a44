"""Ray: a runtime in each of several actors, with prompts sharded over them, on one machine or many.

    pool = rewardrt.ray.Pool("path/to/model", actors=2)
    samples = pool.sample(prompts, n=8, seed=1)      # the result of one runtime, to the bit
    pool.update(policy.state_dict())                 # through the object store into a transaction of every actor

An actor that is lost is started again, gets the present weights, and its work is done once more; since a draw depends
on (seed, stream, sample, position) alone, the result is that of an undisturbed run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from . import errors
from ._inputs import Prompt
from ._tensors import Tensor, tensor
from .model import Model
from .results import Logprobs, Samples, Scores, joined
from .runtime import Runtime
from .update import Update

# Weights travel in objects of about this size, so that an actor takes one while the next is on its way.
_CHUNK_BYTES = 256 << 20
# Shards an actor holds at a time. They share its steps, and the next is there when one ends.
_SHARDS_AT_ONCE = 2
# More shards than actors let actors of different speed end together, and little is done again after a loss; but a step
# with few sequences reads the weights as often as one with many, so no shard has fewer than fill it.
_SHARDS_AN_ACTOR = 8
_SHARD_SEQUENCES = 64
# An actor that is lost so often without finishing anything will not come back.
_MAX_LOSSES = 5


class _Weights(NamedTuple):
    """An update, with its tensors in the object store."""

    chunks: list[Any]
    require: str
    convert: bool
    version: int


class _Host:
    """What an actor runs: a model on a runtime of its own."""

    def __init__(self, path: str, device: str, threads: int, options: dict[str, Any]) -> None:
        # Nothing that can fail: Ray would say no more than that the actor has died.
        self._arguments = path, device, threads, options
        self._update: Update | None = None
        # An abort may come while a stage that nobody waits for any more goes on.
        self._changing = threading.RLock()

    def load(self, weights: list[_Weights]) -> None:
        """Loads the model and gives it these updates."""
        self._model = _load(*self._arguments)
        for update in weights:
            self.stage(update.chunks, update.require, update.convert)
            self.commit(update.version)

    def version(self) -> int:
        return self._model.version

    def stage(self, chunks: list[Any], require: str, convert: bool) -> None:
        """Puts all tensors into a transaction, straight from the object store's memory."""
        with self._changing:
            self.abort()
            self._update = self._model.update(require=require, convert=convert)  # type: ignore[arg-type]
            try:
                for chunk in chunks:
                    self._update.put_all(ray.get(chunk))
            except BaseException:
                self.abort()
                raise

    def commit(self, version: int) -> None:
        with self._changing:
            assert self._update is not None
            self._update.commit(version)
            self._update = None

    def abort(self) -> None:
        with self._changing:
            if self._update is not None:
                self._update.abort()
                self._update = None

    def run(self, method: str, sequences: list[Any], options: dict[str, Any]) -> Any:
        return getattr(self._model, method)(sequences, **options).result()

    def process(self) -> int:
        return os.getpid()


def _load(path: str, device: str, threads: int, options: Mapping[str, Any]) -> Model:
    """A model on a new runtime, with the threads that Ray gave this worker unless there is a wish."""
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return Runtime(device, threads=threads or max(1, int(given))).load_model(path, **options)


class Pool:
    """Actors that host the same model. One call at a time: others wait.

    - ``path``: the model folder, at the same place on every machine.
    - ``actors``: how many. ``actor_options`` are Ray's (``num_cpus``, ``num_gpus``, ``resources``,
      ``scheduling_strategy``, …).
    - ``device``, ``threads``: of each runtime; threads 0 are as many as the actor has CPUs.
    - ``model_options``: those of :meth:`Runtime.load_model`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        actors: int = 1,
        device: str = "auto",
        threads: int = 0,
        model_options: Mapping[str, Any] | None = None,
        actor_options: Mapping[str, Any] | None = None,
    ) -> None:
        if actors < 1:
            raise errors.ArgumentError(f"actors is {actors}, it must be at least 1")
        # Ray's own restart would forget the weights: lost actors are replaced here.
        placed = {"num_cpus": 1, **(actor_options or {}), "max_restarts": 0, "max_concurrency": _SHARDS_AT_ONCE}
        remote = ray.remote(_Host).options(**placed)
        self._start: Callable[[], Any] = lambda: remote.remote(
            os.fspath(path), device, threads, dict(model_options or {})
        )
        self._lock = threading.Lock()
        self._losses = 0
        # What an actor that starts has to be given: each update since the last whole one.
        self._weights: list[_Weights] = []
        # Actors that are not ready yet: index → reference of their loading.
        self._loading: dict[int, Any] = {}
        self.actors: list[Any] = [None] * actors
        self._version = int((model_options or {}).get("version", 0))
        for index in range(actors):
            self._begin(index)
        try:
            self._all_ready()
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """Of the weights that all actors have."""
        return self._version

    @property
    def losses(self) -> int:
        """Actors that were lost and replaced so far."""
        return self._losses

    def sample(self, prompts: Sequence[Prompt], *, streams: Sequence[int] | None = None, **options: Any) -> Samples:
        """As :meth:`Model.sample`, and the same result to the bit on machines of one kind."""
        if isinstance(prompts, str):
            prompts = [prompts]
        named = list(range(len(prompts))) if streams is None else [int(s) for s in streams]
        if len(named) != len(prompts):
            raise errors.ArgumentError(
                f"streams has {len(named)} elements, it must have one for each of the {len(prompts)} prompts"
            )
        return self._sharded("sample", prompts, {"streams": named}, options)

    def logprobs(
        self, sequences: Sequence[Prompt], *, prompt_lens: Sequence[int] | None = None, **options: Any
    ) -> Logprobs:
        """As :meth:`Model.logprobs`."""
        return self._sharded(
            "logprobs", sequences, {} if prompt_lens is None else {"prompt_lens": list(prompt_lens)}, options
        )

    def score(self, sequences: Sequence[Prompt], **options: Any) -> Scores:
        """As :meth:`Model.score`."""
        return self._sharded("score", sequences, {}, options)

    def update(
        self,
        tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
        version: int | None = None,
        *,
        require: str = "all",
        convert: bool = False,
    ) -> int:
        """Gives every actor new weights and returns their version; tensors and ``require`` as for :meth:`Model.update`.

        All actors or none: each checks all tensors before any commits. The object store keeps the weights for actors
        that start later, until the next whole update.
        """
        with self._lock:
            chosen = self._version + 1 if version is None else version
            if chosen == self._version:
                raise errors.ArgumentError(f"version is {chosen}, which the weights have now: it must be another one")
            update = _Weights([ray.put(chunk) for chunk in _chunks(tensors)], require, convert, chosen)
            self._stage(update)
            # A whole update is all that an actor that starts needs.
            self._commit(update, [update] if require == "all" else [*self._weights, update])
            return chosen

    def close(self) -> None:
        """Ends the actors."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors, self._weights, self._loading = [], [], {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sharded(
        self, method: str, sequences: Sequence[Any], per_sequence: Mapping[str, list[Any]], options: dict[str, Any]
    ) -> Any:
        if not self.actors:
            raise errors.Closed("the pool is closed")
        if not len(sequences):
            raise errors.ArgumentError(f"{method}: there are no sequences")
        with self._lock:
            shards = np.array_split(np.arange(len(sequences)), self._shards(len(sequences), options.get("n", 1)))
            work = [
                (
                    method,
                    [sequences[i] for i in shard],
                    {**options, **{name: values[shard[0] : shard[-1] + 1] for name, values in per_sequence.items()}},
                )
                for shard in shards
            ]
            parts = self._done(work)
            return joined(parts, [int(shard[0]) for shard in shards] if method == "sample" else None)

    def _shards(self, count: int, n: int) -> int:
        """How many shards ``count`` prompts of ``n`` answers each make."""
        actors = len(self.actors)
        full = count * max(n, 1) // (_SHARD_SEQUENCES * actors)
        return min(count, actors * min(max(full, 1), _SHARDS_AN_ACTOR))

    def _done(self, work: list[tuple[str, list[Any], dict[str, Any]]]) -> list[Any]:
        """The results of all shards, whatever happens to the actors meanwhile."""
        waiting = list(range(len(work)))[::-1]
        results: list[Any] = [None] * len(work)
        running: dict[Any, tuple[int, int]] = {}  # reference → (shard, index of its actor)
        losses = 0
        while waiting or running:
            while waiting:
                busy = [index for _, index in running.values()]
                # One shard after the other to whoever has the fewest: none idles while another has two.
                index = min(set(range(len(self.actors))) - self._loading.keys(), key=busy.count, default=None)
                if index is None or busy.count(index) >= _SHARDS_AT_ONCE:
                    break
                shard = waiting.pop()
                running[self.actors[index].run.remote(*work[shard])] = (shard, index)
            loading = {reference: index for index, reference in self._loading.items()}
            ready, _ = ray.wait([*running, *loading], num_returns=1)
            index = loading[ready[0]] if ready[0] in loading else running[ready[0]][1]
            try:
                if ready[0] in loading:
                    self._ready(index)
                else:
                    results[running[ready[0]][0]] = _get(ready[0])
                    del running[ready[0]]
                    losses = 0
            except ray.exceptions.RayActorError:
                self._lost(index)
                losses += 1
                if losses > _MAX_LOSSES:
                    raise
                # All that the actor had is done again, by whoever is free.
                lost = [reference for reference, (_, i) in running.items() if i == index]
                waiting.extend(running.pop(reference)[0] for reference in lost)
        return results

    def _begin(self, index: int) -> None:
        """Starts an actor, which loads the model and the present weights meanwhile."""
        self.actors[index] = self._start()
        self._loading[index] = self.actors[index].load.remote(self._weights)

    def _replace(self, index: int) -> None:
        """Starts an actor in the place of one that is lost, or whose weights are not those of the others."""
        ray.kill(self.actors[index])
        self._begin(index)

    def _ready(self, index: int) -> None:
        """Waits for an actor that loads. What that fails with is raised, and another one started for the next call."""
        try:
            _get(self._loading[index])
            del self._loading[index]
        except ray.exceptions.RayActorError:
            raise
        except BaseException:
            self._replace(index)
            raise

    def _lost(self, index: int) -> None:
        self._losses += 1
        self._replace(index)

    def _all_ready(self) -> None:
        """Waits until every actor has the present weights."""
        losses = 0
        while self._loading:
            index = next(iter(self._loading))
            try:
                self._ready(index)
            except ray.exceptions.RayActorError:
                self._lost(index)
                losses += 1
                if losses > _MAX_LOSSES:
                    raise

    def _stage(self, update: _Weights) -> None:
        """Puts an update's tensors into a transaction of every actor; into none if one refuses them."""
        staged: set[int] = set()
        losses = 0
        try:
            while len(staged) < len(self.actors):
                self._all_ready()
                missing = [index for index in range(len(self.actors)) if index not in staged]
                asked = [
                    (i, self.actors[i].stage.remote(update.chunks, update.require, update.convert)) for i in missing
                ]
                for index, reference in asked:
                    try:
                        _get(reference)
                        staged.add(index)
                    except ray.exceptions.RayActorError:
                        self._lost(index)
                        losses += 1
                        if losses > _MAX_LOSSES:
                            raise
        except BaseException:
            self._abort(range(len(self.actors)))
            raise

    def _commit(self, update: _Weights, weights: list[_Weights]) -> None:
        """Commits what every actor has staged. If one cannot, those that could are started anew with the weights from
        before, and the others abort."""
        waiting = [(index, actor.commit.remote(update.version)) for index, actor in enumerate(self.actors)]
        refused: list[int] = []
        lost: list[int] = []
        failure: BaseException | None = None
        for index, reference in waiting:
            try:
                _get(reference)
            except ray.exceptions.RayActorError:
                lost.append(index)
            except errors.Error as error:
                refused.append(index)
                failure = failure or error
            except BaseException as error:
                # Whether it has committed is not known.
                failure = failure or error
        if failure is None:
            self._weights, self._version = weights, update.version
            for index in lost:
                self._lost(index)
            return
        self._abort(refused)
        for index in lost:
            self._lost(index)
        for index in set(range(len(self.actors))) - {*refused, *lost}:
            self._replace(index)
        raise failure

    def _abort(self, indices: Iterable[int]) -> None:
        """Ends the transactions of actors that have not committed."""
        asked = [(index, self.actors[index].abort.remote()) for index in indices]
        for index, reference in asked:
            try:
                _get(reference)
            except ray.exceptions.RayActorError:
                self._lost(index)


def _get(references: Any) -> Any:
    """ray.get, raising the library's own errors as they were raised."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, errors.Error):
            raise error.cause from None
        raise


def _chunks(tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, value in tensors.items() if isinstance(tensors, Mapping) else tensors:
        found = tensor(value, name)
        if chunk and size + found.bits.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, found))
        size += found.bits.nbytes
    if chunk:
        yield chunk


class Scorer:
    """A class for ``Dataset.map_batches`` of Ray Data: adds a column with the score of each row.

        dataset.map_batches(
            rewardrt.ray.Scorer, fn_constructor_kwargs={"path": "path/to/reward-model"}, concurrency=2, batch_size=64,
        )

    - ``column``: texts, lists of ids, or lists of messages. ``output``: the new column, float32, the value of
      ``label``.
    - ``rule``: as in :meth:`Model.score`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        column: str = "text",
        output: str = "score",
        rule: str | None = None,
        label: int = 0,
        device: str = "auto",
        threads: int = 0,
        model_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = _load(os.fspath(path), device, threads, model_options or {})
        self._column, self._output, self._rule, self._label = column, output, rule, label

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._column not in batch:
            raise errors.ArgumentError(f"there is no column {self._column!r}, only {', '.join(map(repr, batch))}")
        rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in batch[self._column]]
        scores = self._model.score(rows, rule=self._rule, label=self._label).result()
        return {**batch, self._output: scores.score.copy()}
