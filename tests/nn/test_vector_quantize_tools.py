"""VectorQuantize among PyTorch's tools: compile, export, copies, wrappers, and its memory."""

from __future__ import annotations

import copy
import pickle
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastvq.nn import code_scores
from fastvq.nn.vector_quantize import VectorQuantize

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "expiry": {"kmeans_init": True, "threshold_ema_dead_code": 2},
    "learnable": {"learnable_codebook": True},
    "cosine": {"use_cosine_sim": True},
    "separate_heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "drawn": {"stochastic_sample_codes": True},
    "losses": {
        "codebook_diversity_loss_weight": 0.1,
        "orthogonal_reg_weight": 0.1,
        "orthogonal_reg_active_codes_only": True,
        "commitment_use_cross_entropy_loss": True,
    },
}


def _started(options: dict[str, Any]) -> VectorQuantize:
    """A module past its k-means start, which waits for the device."""
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, **options)
    module(torch.randn(2, 9, 8))
    return module


def _step(module: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    inputs = x.clone().requires_grad_()
    quantize, indices, loss = module(inputs)
    (quantize.sum() + loss).backward()
    assert inputs.grad is not None
    return quantize.detach(), indices, loss.detach(), inputs.grad


@pytest.mark.parametrize("option", OPTIONS)
def test_training_step_compiles_as_one_graph(option: str) -> None:
    eager = _started(OPTIONS[option])
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(2, 9, 8)
        for a, b in zip(_step(eager, x, seed), _step(compiled, x, seed), strict=True):
            torch.testing.assert_close(a, b)
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(value, module.state_dict()[key])


@pytest.mark.parametrize("option", ["default", "cosine", "separate_heads"])
def test_encoding_and_decoding_export(option: str) -> None:
    module = _started(OPTIONS[option]).eval()

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = module

        def forward(self, indices: Tensor) -> Tensor:
            return self.quantizer.get_output_from_indices(indices)

    x = torch.randn(2, 9, 8)
    quantize, indices, _ = module(x)
    exported = torch.export.export(module, (x,)).module()(x)
    assert torch.equal(exported[1], indices)
    assert torch.equal(exported[0], quantize)
    decoded = torch.export.export(Decoder(), (indices,)).module()(indices)
    torch.testing.assert_close(decoded, quantize)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("option", OPTIONS)
def test_copies_go_on_alike(option: str, how: str) -> None:
    module = _started(OPTIONS[option])
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        other = VectorQuantize(8, 16, **OPTIONS[option])
        other.load_state_dict(module.state_dict())
    x = torch.randn(2, 9, 8)
    for a, b in zip(_step(module, x, 1), _step(other, x, 1), strict=True):
        assert torch.equal(a, b)
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    with torch.no_grad():
        module._codebook.embed.zero_()
    assert other.codebook.any()


def test_a_copy_has_its_own_in_place_optimizer() -> None:
    module = VectorQuantize(
        8, 16, learnable_codebook=True,
        in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )  # fmt: skip
    other = copy.deepcopy(module)
    before = module.codebook.detach().clone()
    other(torch.randn(2, 9, 8))
    assert torch.equal(module.codebook, before)
    assert not torch.equal(other.codebook, before)


def test_runs_inside_ddp_and_fsdp() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        for option in ("default", "expiry", "learnable"):
            model = nn.Sequential(nn.Linear(8, 8), _started(OPTIONS[option]))
            wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
            x = torch.randn(2, 9, 8)
            for a, b in zip(_step(model, x, 5), _step(wrapped, x, 5), strict=True):
                assert torch.equal(a, b)
            sharded = copy.deepcopy(model)
            torch.distributed.fsdp.fully_shard(sharded)
            for a, b in zip(_step(model, x, 6), _step(sharded, x, 6), strict=True):
                assert torch.equal(a, b)
    finally:
        dist.destroy_process_group()


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("option", [*OPTIONS, "gumbel"])
def test_nothing_of_size_n_by_k_is_allocated(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, codes, dim = 600, 500, 8
    monkeypatch.setattr(code_scores, "SCORES_PER_BLOCK", 8192)
    gumbel = {
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
    }
    module = VectorQuantize(dim, codes, **OPTIONS.get(option, gumbel))
    with _Largest() as largest:
        x = torch.randn(1, rows, dim, requires_grad=True)
        quantize, _, loss = module(x)
        (quantize.sum() + loss).backward()
        module.eval()(x)
    assert largest.elements <= max(rows * dim, codes * dim, 8192) * 4
    assert largest.elements < rows * codes / 8


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_blocks_change_nothing(
    metric: str, topk: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codes = torch.randn(2, 50, 4), torch.randn(2, 11, 4)
    found = []
    for size in (1, 100, 1 << 22):
        monkeypatch.setattr(code_scores, "SCORES_PER_BLOCK", size)
        torch.manual_seed(3)
        found.append(code_scores.choose_codes(x, codes, metric, topk=topk, temperature=temperature))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_topk_ranks_as_float64_does() -> None:
    x = torch.randn(1, 200, 4)
    codes = torch.randn(1, 30, 4)
    codes[0, 20:] = codes[0, :10]  # equal codes, by index
    found = code_scores.choose_codes(x, codes, "l2", topk=5)
    distance = (x.double()[0, :, None] - codes.double()[0]).square().sum(dim=-1)
    assert torch.equal(found[0], distance.sort(dim=1, stable=True).indices[:, :5])
    first = code_scores.choose_codes(x, codes, "l2", topk=1)
    assert torch.equal(first[..., 0], code_scores.choose_codes(x, codes, "l2"))


def test_drawn_codes_have_their_probabilities() -> None:
    x, codes = torch.randn(1, 1, 4), torch.randn(1, 5, 4)
    torch.manual_seed(0)
    draws = 20_000
    found = code_scores.choose_codes(x.expand(1, draws, 4), codes, "l2", temperature=0.7).flatten()
    expected = (code_scores.scores(x, codes, "l2") / 0.7).softmax(dim=-1)[0, 0]
    share = found.bincount(minlength=5) / draws
    # Five standard deviations of a binomial share.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_a_steady_step_reads_nothing_back() -> None:
    """No value of a tensor reaches Python, which on a GPU would wait for it."""
    module = _started({"kmeans_init": True, "threshold_ema_dead_code": 1})
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 9, 8, requires_grad=True)
    module(x)
    with Reads():
        quantize, _, loss = module(x)
        (quantize.sum() + loss).backward()
    assert reads == []
