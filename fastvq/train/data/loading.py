"""Batches in an order that depends on the seed and the step alone, read ahead by worker processes.

What one picture looks like is in dataset.py.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from fastvq.train.data.items import ItemDataset


class _Request(NamedTuple):
    """One batch to read: which epoch it belongs to, and its positions in the dataset."""

    epoch: int
    positions: NDArray[np.int64]


class BrokenItems:
    """The items that could not be decoded so far: each is warned of when it is first met.

    Args:
        noun: what an item is called.
    Attributes:
        reasons: the reason of each, by its name.
    """

    def __init__(self, noun: str = "picture") -> None:
        self.noun = noun
        self.reasons: dict[str, str] = {}

    def add(self, broken: list[tuple[str, str]]) -> None:
        """Takes a batch's `broken`."""
        for name, reason in broken:
            if name not in self.reasons:
                self.reasons[name] = reason
                warnings.warn(
                    f"{self.noun} {name}: it cannot be decoded ({reason}) and is skipped.",
                    stacklevel=3,
                )

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        count = f"{len(self)} {self.noun}{'' if len(self) == 1 else 's'} could not be decoded"
        return f"{count}: {', '.join(self.reasons)}" if self.reasons else count


class BatchIterator:
    """Iterates over batches; `close()`, or the end of a `with` block, stops the worker processes.

    Attributes:
        wait_seconds: time spent waiting for batches so far; with no workers, all of the reading.
        broken: the `BrokenItems` met so far, in batches that have been handed out.
    """

    def __init__(
        self,
        dataset: ItemDataset,
        requests: Iterable[_Request],
        workers: int,
        *,
        drop_broken: bool,
    ) -> None:
        self.wait_seconds = 0.0
        self.broken = BrokenItems(dataset.noun)
        reader = _Reader(dataset, drop_broken)
        self._answers: Iterator[Any] | None
        if workers == 0:
            self._answers = map(reader.__getitem__, requests)
        else:
            # A generator of its own: otherwise each loader draws from the global one, and a
            # resumed run would see other random numbers than an unbroken one.
            loader: DataLoader[Any] = DataLoader(
                reader,
                batch_size=None,
                sampler=requests,
                num_workers=workers,
                collate_fn=_unchanged,
                generator=torch.Generator(),
            )
            self._answers = iter(loader)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Any:
        while self._answers is not None:
            answer = self._next_answer()
            if answer is None:
                break
            if isinstance(answer, ValueError):
                self.close()
                raise answer
            self.broken.add(answer["broken"])
            if len(answer["index"]) > 0:  # else every picture of it was broken and dropped
                return answer
        self.close()
        raise StopIteration

    def _next_answer(self) -> Any:
        assert self._answers is not None
        start = time.perf_counter()
        try:
            return next(self._answers, None)
        except (RuntimeError, OSError, EOFError) as error:
            # A dead worker shows as the loader's own error, or as a connection to it that breaks.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            self.close()
            raise RuntimeError(
                f"a worker process that reads {self.broken.noun}s has died, most often for lack of "
                "memory or of shared memory (/dev/shm). Use fewer workers, or --workers 0 "
                "(workers=0)."
            ) from error
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Stops the worker processes; nothing more is handed out."""
        self._answers = None  # the loader stops them when its iterator is let go of

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Reader(Dataset[Any]):
    """Answers a `_Request`, in whichever process it lives.

    An error travels as a value: raised inside a worker it would arrive wrapped in that worker's
    traceback.
    """

    def __init__(self, dataset: ItemDataset, drop_broken: bool) -> None:
        self._dataset = dataset
        self._drop_broken = drop_broken

    def __getitem__(self, request: _Request) -> Any:
        try:
            return self._dataset.read_batch(
                request.positions, epoch=request.epoch, drop_broken=self._drop_broken
            )
        except ValueError as error:
            return error.with_traceback(None)


def _unchanged(answer: Any) -> Any:
    return answer


def training_batches(
    dataset: ItemDataset,
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
) -> BatchIterator:
    """Endless batches of exactly `batch_size` pictures; which ones, the seed and the step decide.

    Each epoch is a permutation of the dataset drawn from (seed, epoch), cut into global batches of
    world_size · batch_size, of which rank r takes the r-th part; the ragged end of an epoch is left
    out. A run that starts at any step therefore goes on as one that started at 0. A picture that
    cannot be decoded is replaced by the next one that can.

    Args:
        dataset: if smaller than one global batch, its pictures are repeated, with a warning.
        batch_size: pictures per step on this rank.
        seed: 0 or more.
        start_step: steps already taken.
        rank: 0 ... world_size − 1.
        world_size: number of processes that train together.
        workers: processes that read ahead, two batches each; 0 reads in this one. None: 0 where
            pictures are not decoded, else the number of processor cores, at most 4.
    Raises:
        ValueError: an argument breaks its rule; while iterating, what `read_batch` raises.
        RuntimeError: while iterating, a worker process died.
    """
    _check_counts("training_batches", dataset, batch_size, rank, world_size, workers)
    for name, value in (("seed", seed), ("start_step", start_step)):
        if value < 0:
            raise ValueError(f"training_batches: {name} must be 0 or more; got {value}.")
    if len(dataset) < batch_size * world_size:
        warnings.warn(
            f"training_batches: {len(dataset)} {dataset.noun}s are fewer than one step takes "
            f"({world_size} × {batch_size}), so a batch repeats some. Use a smaller batch size.",
            stacklevel=2,
        )
    requests = _training_requests(len(dataset), batch_size, seed, start_step, rank, world_size)
    return BatchIterator(dataset, requests, _workers(dataset, workers), drop_broken=False)


def evaluation_batches(
    dataset: ItemDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
) -> BatchIterator:
    """Every picture once, in order, as of epoch 0.

    Rank r reads the r-th of world_size contiguous parts, so ranks may have different numbers of
    batches. A picture that cannot be decoded is left out; that batch, and the last one, are
    smaller. Arguments and errors as `training_batches`.
    """
    _check_counts("evaluation_batches", dataset, batch_size, rank, world_size, workers)
    first, end = (len(dataset) * r // world_size for r in (rank, rank + 1))
    positions = np.arange(first, end)
    requests = [
        _Request(0, positions[start : start + batch_size])
        for start in range(0, len(positions), batch_size)
    ]
    return BatchIterator(dataset, requests, _workers(dataset, workers), drop_broken=True)


def steps_per_epoch(dataset: ItemDataset, batch_size: int, world_size: int = 1) -> int:
    """Steps that `training_batches` takes to go through the dataset once; at least 1."""
    return max(1, len(dataset) // (batch_size * world_size))


def _training_requests(
    count: int, batch_size: int, seed: int, start_step: int, rank: int, world_size: int
) -> Iterator[_Request]:
    global_batch = batch_size * world_size
    epoch, step = divmod(start_step, max(1, count // global_batch))
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        if count < global_batch:
            order = np.resize(order, global_batch)
        for first in range(step * global_batch, len(order) - global_batch + 1, global_batch):
            start = first + rank * batch_size
            yield _Request(epoch, order[start : start + batch_size])
        epoch, step = epoch + 1, 0


def _check_counts(
    name: str,
    dataset: ItemDataset,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int | None,
) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{name}: dataset must hold at least one {dataset.noun}; got none.")
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size must be 1 or more; got {batch_size}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"{name}: rank must be in 0 ... {world_size - 1}; got {rank}.")
    if workers is not None and workers < 0:
        raise ValueError(f"{name}: workers must be 0 or more; got {workers}.")


def _workers(dataset: ItemDataset, workers: int | None) -> int:
    if workers is not None:
        return workers
    if not dataset.decodes:
        return 0
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores this process may use
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)
