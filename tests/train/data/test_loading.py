"""The order of batches, over steps, ranks and workers; broken pictures and dead workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastvq.train.data import (
    Batch,
    PictureDataset,
    evaluation_batches,
    open_source,
    steps_per_epoch,
    training_batches,
)


@pytest.fixture
def dataset(folder: Path) -> PictureDataset:
    return PictureDataset(open_source(folder), flip=True, seed=3)


def take(dataset: PictureDataset, steps: int, **arguments: int) -> list[Batch]:
    with training_batches(dataset, **{"batch_size": 3, "workers": 0, **arguments}) as batches:
        return list(itertools.islice(batches, steps))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key])  # type: ignore[literal-required]
        for a, b in zip(first, second)
        for key in ("picture", "label", "index")
    )


def indices(batches: list[Batch]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def joined(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def test_each_epoch_is_a_new_order_without_repeats(dataset: PictureDataset) -> None:
    assert steps_per_epoch(dataset, 3) == 3
    epochs = [joined(indices(take(dataset, 3, start_step=s))) for s in (0, 3, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 9
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert indices(take(dataset, 3, seed=1)) != indices(take(dataset, 3, seed=0))


@pytest.mark.parametrize("start", [1, 2, 3, 4, 7])
def test_starting_anywhere_continues_the_same_sequence(dataset: PictureDataset, start: int) -> None:
    assert same(take(dataset, 10)[start:], take(dataset, 10 - start, start_step=start))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset: PictureDataset, folder: Path, workers: int) -> None:
    (folder / "a/02.png").write_bytes(b"broken")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel = take(dataset, 8, workers=workers)
        serial = take(dataset, 8)
        ours = [w for w in caught if "a/02.png" in str(w.message)]
    assert same(parallel, serial)
    assert len(ours) == 2  # one for each iterator, though every epoch meets the picture
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_read_one_zip_side_by_side(folder: Path) -> None:
    archive = shutil.make_archive(str(folder), "zip", folder)
    dataset = PictureDataset(open_source(archive), strict=True)  # this process has it open now
    assert same(take(dataset, 60, workers=2), take(dataset, 60))


def test_ranks_divide_the_global_batch(dataset: PictureDataset) -> None:
    alone = take(dataset, 5, batch_size=4)
    ranks = [take(dataset, 5, batch_size=2, rank=r, world_size=2) for r in (0, 1)]
    for step in range(5):
        for key in ("picture", "index"):
            parts = [rank[step][key] for rank in ranks]  # type: ignore[literal-required]
            assert torch.equal(torch.cat(parts), alone[step][key])  # type: ignore[literal-required]


def test_a_dataset_smaller_than_a_batch_is_repeated_with_a_warning(dataset: PictureDataset) -> None:
    with pytest.warns(UserWarning, match=r"11 pictures are fewer than one step takes \(2 × 8\)"):
        ranks = [take(dataset, 2, batch_size=8, rank=r, world_size=2) for r in (0, 1)]
    for step in (0, 1):
        met = joined(indices([rank[step] for rank in ranks]))
        assert sorted(set(met)) == list(range(11))
        assert len(met) == 16
    assert steps_per_epoch(dataset, 8, 2) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 13])
def test_evaluation_meets_every_picture_once_in_order(
    dataset: PictureDataset, workers: int, world_size: int
) -> None:
    met: list[list[int]] = []
    for rank in range(world_size):
        with evaluation_batches(
            dataset, batch_size=2, rank=rank, world_size=world_size, workers=workers
        ) as batches:
            met += indices(list(batches))
    assert joined(met) == list(range(11))
    assert max(len(batch) for batch in met) == (2 if world_size < 11 else 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_drops_broken_pictures_and_counts_them(
    dataset: PictureDataset, folder: Path, workers: int
) -> None:
    for name in ("a/02.png", "a/03.png", "b/10.png"):
        (folder / name).write_bytes(b"broken")
    batches = evaluation_batches(dataset, batch_size=2, workers=workers)
    with pytest.warns(UserWarning, match=r"picture .*: it cannot be decoded .* and is skipped"):
        met = indices(list(batches))
    assert met == [[0, 1], [4, 5], [6, 7], [8, 9]]  # a batch of broken pictures only is no batch
    assert len(batches.broken) == 3
    assert str(batches.broken).startswith(f"3 pictures could not be decoded: {folder}/a/02.png")
    assert batches.wait_seconds > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_ours_from_workers_too(folder: Path, workers: int) -> None:
    (folder / "b/07.png").write_bytes(b"broken")
    dataset = PictureDataset(open_source(folder), strict=True)
    with (
        training_batches(dataset, batch_size=11, workers=workers) as batches,
        pytest.raises(ValueError, match=r"b/07.png: it cannot be decoded") as caught,
    ):
        next(batches)
    assert "\n" not in str(caught.value)
    assert next(batches, None) is None


def test_closing_stops_the_workers(dataset: PictureDataset) -> None:
    before = set(multiprocessing.active_children())
    with training_batches(dataset, batch_size=3, workers=2) as batches:
        next(batches)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) <= before
    assert next(batches, None) is None


def test_a_killed_worker_is_one_clear_error(dataset: PictureDataset) -> None:
    before = set(multiprocessing.active_children())
    with training_batches(dataset, batch_size=3, workers=1) as batches:
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - before
        assert worker.pid is not None
        pid = worker.pid

        def kill_and_go_on() -> None:
            os.kill(pid, signal.SIGKILL)
            for _ in batches:
                time.sleep(0.01)

        # The signal of its child's end may meet this process outside of the iterator, too: that
        # error is the loader's own, one line with the pid.
        with pytest.raises(RuntimeError, match=r"a worker process .* has died|DataLoader worker"):
            kill_and_go_on()


def test_bad_arguments(dataset: PictureDataset) -> None:
    for arguments, message in [
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0 ... 1; got 2"),
        ({"workers": -1}, "workers must be 0 or more; got -1"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"start_step": -1}, "start_step must be 0 or more; got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            take(dataset, 1, **arguments)
    with pytest.raises(ValueError, match="at least one picture"):
        evaluation_batches(dataset.subset([]), batch_size=1)
