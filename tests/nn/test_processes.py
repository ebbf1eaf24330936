"""Quantizers in two and three real processes (gloo), against one process on the joined batch.

Every case runs in the same worker processes, one after the other, so that a process that left a
collective out would make the next case hang or disagree. Each worker notes its collectives, and
they must be the same, in the same order, on all ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvq import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize
from fastvq.nn import Codebook

U = 2.0**-24  # float32
STEPS = 6
DIM = 3
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    """A module, and how its rows are dealt out."""

    build: Callable[[], nn.Module]
    deal: Callable[[int, int, int], Batch]  # (step, rank, world) → rows and mask
    accumulate: int = 1  # batches per optimizer step, where there is one


def _rows(count: int, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return 2.0 * torch.randn(count, DIM, generator=generator)


def even(step: int, rank: int, world: int) -> Batch:
    return _rows(24, step, rank), None


def uneven(step: int, rank: int, world: int) -> Batch:
    return _rows(5 + 17 * rank, step, rank), None


def empty_on_one(step: int, rank: int, world: int) -> Batch:
    x = _rows(21, step, rank)
    return (x[:0] if rank == step % world else x), None


def masked_on_one(step: int, rank: int, world: int) -> Batch:
    mask = torch.ones(21, dtype=torch.bool)
    if rank == step % world:
        mask[:] = False
    return _rows(21, step, rank), mask


def nothing_anywhere(step: int, rank: int, world: int) -> Batch:
    return _rows(9, step, rank), torch.zeros(9, dtype=torch.bool)


def nan_on_one(step: int, rank: int, world: int) -> Batch:
    x = _rows(19, step, rank)
    if rank == 0:
        x[step] = torch.nan
    return x, None


def codebook(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Codebook(8, DIM, **{"decay": 0.7, "revive_below": 0.0, **options})


CASES = {
    "even": Case(codebook(kmeans_init=False), even),
    "uneven": Case(codebook(kmeans_init=False), uneven),
    "empty on one": Case(codebook(kmeans_init=False), empty_on_one),
    "masked on one": Case(codebook(kmeans_init=False), masked_on_one),
    "nothing anywhere": Case(codebook(kmeans_init=False), nothing_anywhere),
    "NaN on one": Case(codebook(kmeans_init=False), nan_on_one),
    "k-means": Case(codebook(), uneven),
    "k-means, empty on one": Case(codebook(), empty_on_one),
    "k-means, masked on one": Case(codebook(), masked_on_one),
    "k-means, nothing anywhere": Case(codebook(), nothing_anywhere),
    "revival": Case(codebook(revive_below=0.5), uneven),
    "revival, empty on one": Case(codebook(revive_below=0.5), empty_on_one),
    "revival, masked on one": Case(codebook(revive_below=0.5), masked_on_one),
    "revival by count": Case(codebook(kmeans_init=False, revive_below_count=2.0), uneven),
    "cosine": Case(codebook(metric="cosine"), uneven),
    "cosine, empty on one": Case(codebook(metric="cosine", revive_below=0.5), empty_on_one),
    "smoothed counts": Case(codebook(ema_rule="smoothed_counts"), masked_on_one),
    "debiased": Case(codebook(ema_rule="debiased", kmeans_init=False), empty_on_one),
    "learnable": Case(codebook(learnable=True, revive_below=0.5), uneven),
    "learnable, empty on one": Case(codebook(learnable=True, revive_below=0.5), empty_on_one),
}


def run_case(case: Case, rank: int, world: int, module: nn.Module) -> dict[str, Tensor]:
    """The state after some steps on one rank's rows; alone (rank −1) on those of all ranks."""
    for step in range(STEPS):
        torch.manual_seed(1000 + step)
        if rank >= 0:
            torch.rand(rank)  # process 0's draws must count on every process
            x, mask = case.deal(step, rank, world)
        else:
            x, mask = joined(case, step, world)
        module(x, mask)
    return {key: value.clone() for key, value in module.state_dict().items()}


def joined(case: Case, step: int, world: int) -> Batch:
    shares = [case.deal(step, rank, world) for rank in range(world)]
    masks = [torch.ones(len(x), dtype=torch.bool) if mask is None else mask for x, mask in shares]
    return torch.cat([x for x, _ in shares]), torch.cat(masks)


# Whole models under DistributedDataParallel, its defaults kept: a parameter without a gradient is
# an error in the step after.


class Autoencoder(nn.Module):
    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.quantizer = quantizer

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        told = {} if mask is None else {"mask": mask}
        quantized, _, *losses = self.quantizer(self.encoder(x)[None], **told)
        difference = self.decoder(quantized[0]) - x
        if mask is not None:
            difference = difference[mask[0]]
        return (difference**2).sum() / 50.0 + sum(loss.sum() for loss in losses)


def quantizer(**options: Any) -> Callable[[], nn.Module]:
    return lambda: VectorQuantize(DIM, 8, **options)


def residual(**options: Any) -> Callable[[], nn.Module]:
    return lambda: ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=8, **options)


WRAPPED = {
    "default": Case(quantizer(), even),
    "projections": Case(quantizer(codebook_dim=2, kmeans_init=True), uneven),
    "expiry": Case(quantizer(threshold_ema_dead_code=1, kmeans_init=True), uneven),
    "masked on one": Case(quantizer(codebook_dim=2), masked_on_one),
    "empty on one": Case(quantizer(codebook_dim=2, kmeans_init=True), empty_on_one),
    "learnable": Case(quantizer(learnable_codebook=True, ema_update=False), masked_on_one),
    "learnable, k-means": Case(
        quantizer(learnable_codebook=True, ema_update=False, kmeans_init=True), empty_on_one
    ),
    "separate heads": Case(
        quantizer(heads=2, codebook_dim=2, separate_codebook_per_head=True, kmeans_init=True),
        uneven,
    ),
    "accumulated": Case(quantizer(codebook_dim=2), even, accumulate=2),
    "cosine": Case(quantizer(use_cosine_sim=True, kmeans_init=True), masked_on_one),
    "drawn codes": Case(quantizer(stochastic_sample_codes=True), uneven),
    "losses of the codes": Case(
        quantizer(orthogonal_reg_weight=1.0, codebook_diversity_loss_weight=0.1), empty_on_one
    ),
    "optimizer in place": Case(
        quantizer(
            learnable_codebook=True,
            ema_update=False,
            in_place_codebook_optimizer=lambda codes: torch.optim.SGD(codes, lr=0.1),
        ),
        uneven,
    ),
    "residual": Case(residual(kmeans_init=True, threshold_ema_dead_code=1), uneven),
    "residual, masked on one": Case(residual(codebook_dim=2), masked_on_one),
    "residual, shared, dropout": Case(
        residual(shared_codebook=True, quantize_dropout=True, kmeans_init=True), empty_on_one
    ),
    "SimVQ": Case(lambda: SimVQ(DIM, 8), uneven),
    "SimVQ, empty on one": Case(lambda: SimVQ(DIM, 8), empty_on_one),
    "FSQ": Case(lambda: FSQ([4, 3, 5]), empty_on_one),
    "LFQ": Case(lambda: LFQ(dim=DIM, codebook_size=8), uneven),
    "LFQ, empty on one": Case(lambda: LFQ(dim=DIM, codebook_size=8), empty_on_one),
    "LFQ, masked on one": Case(lambda: LFQ(dim=DIM, codebook_size=8), masked_on_one),
}


def run_wrapped(case: Case, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    trained = DistributedDataParallel(Autoencoder(case.build()))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for step in range(STEPS):
        x, mask = case.deal(step, rank, world)
        last = (step + 1) % case.accumulate == 0
        with contextlib.nullcontext() if last else trained.no_sync():
            trained(x, None if mask is None else mask[None]).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return {key: value.clone() for key, value in trained.module.state_dict().items()}


@contextlib.contextmanager
def noted_collectives() -> Iterator[list[str]]:
    """The names and sizes of the collectives that are called, in order."""
    names = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "barrier")
    originals = {name: getattr(dist, name) for name in names}
    notes: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            shapes = [tuple(value.shape) for value in args if isinstance(value, Tensor)]
            notes.append(f"{name}{shapes}")
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, noting(name))
    try:
        yield notes
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Built before the process group exists, as a model often is.
    modules = {name: case.build() for name, case in CASES.items()}
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    for module in modules.values():
        for value in module.state_dict().values():
            dist.broadcast(value, 0)
    results: dict[str, Any] = {"collectives": {}, "start": {}}
    for name, case in CASES.items():
        results["start"][name] = {k: v.clone() for k, v in modules[name].state_dict().items()}
        with noted_collectives() as notes:
            results[name] = run_case(case, rank, world, modules[name])
        results["collectives"][name] = notes
    for name, case in WRAPPED.items():
        results[f"wrapped {name}"] = run_wrapped(case, rank, world)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each rank found in each case."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"world{world}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(world, port, str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert not value.isnan().any(), key


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for other in ranks[1:]:
        assert_same(ranks[0][name], other[name])


@pytest.mark.parametrize("name", CASES)
def test_ranks_call_the_same_collectives(ranks: list[dict[str, Any]], name: str) -> None:
    assert ranks[0]["collectives"][name]
    for other in ranks[1:]:
        assert other["collectives"][name] == ranks[0]["collectives"][name]


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    case, world = CASES[name], len(ranks)
    alone = case.build()
    alone.load_state_dict(ranks[0]["start"][name])
    state = run_case(case, -1, world, alone)
    # At each step, sums of at most 81 rows of values below 10 in several parts instead of one, and
    # what such errors do to a quotient.
    count = STEPS * U * 81
    total = 10 * count
    least = state["cluster_size"].min().item()
    bounds = {"initted": 0.0, "ema_steps": 0.0, "cluster_size": count, "embed_avg": total}
    bounds["embed"] = (total + 10 * count) / least + 81 * U
    if getattr(case.build(), "metric", "l2") == "cosine":
        # Rows of length 1; the codes are means divided by their length instead of their count.
        bounds["embed_avg"] = count
        least = state["embed_avg"].norm(dim=-1).min().item()
        bounds["embed"] = 2 * count / least + 81 * U
    for key, value in state.items():
        assert (value.double() - ranks[0][name][key].double()).abs().max() <= bounds[key], key


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_agree_to_the_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for other in ranks[1:]:
        assert_same(ranks[0][f"wrapped {name}"], other[f"wrapped {name}"])
