"""SimVQ and ResidualSimVQ: the peer's results, exact indices, and safety."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nn.peer import assert_same, assert_same_step, pair
from ops.nearest_code_cases import ordered_argmin
from torch import nn

from fastvq import ResidualSimVQ, SimVQ

SINGLE = [
    ({}, (2, 9, 8)),
    ({"rotation_trick": False}, (2, 9, 8)),
    ({"channel_first": True}, (2, 8, 3, 4)),
    ({"frozen_codebook_dim": 5, "commitment_weight": 2.0}, (2, 3, 4, 8)),
    ({"input_to_quantize_commit_loss_weight": 0.5, "init_fn": torch.tanh}, (2, 9, 8)),
]
RESIDUAL = [
    ({}, (2, 9, 8)),
    ({"rotation_trick": False, "commitment_weight": 0.5}, (2, 9, 8)),
    ({"channel_first": True}, (2, 8, 3, 4)),
    ({"quantize_dropout": True, "quantize_dropout_cutoff_index": 1}, (2, 9, 8)),
    ({"quantize_dropout": True, "quantize_dropout_multiple_of": 2}, (2, 9, 8)),
]
# Longest sum: a gradient over 18 vectors of 8 channels, or a norm of 8 channels.
TERMS = 256


def _transform() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "shape"), SINGLE)
def test_same_as_the_peer(options: dict, shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair("SimVQ", dim=8, codebook_size=32, **options)
    ours.train(training)
    theirs.train(training)
    x = 0.3 * torch.randn(shape)
    _, indices, _ = assert_same_step(ours, theirs, x, TERMS)
    assert_same(ours.codebook, theirs.codebook, TERMS)
    assert_same(ours.indices_to_codes(indices), theirs.indices_to_codes(indices), TERMS)


def test_own_transform() -> None:
    ours, theirs = pair("SimVQ", dim=8, codebook_size=32)
    ours.code_transform, theirs.code_transform = _transform(), _transform()
    assert_same_step(ours, theirs, 0.3 * torch.randn(2, 9, 8), TERMS)
    assert all(p.grad.abs().sum() > 0 for p in ours.code_transform.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "shape"), RESIDUAL)
def test_residual_same_as_the_peer(options: dict, shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair("ResidualSimVQ", dim=8, codebook_size=32, num_quantizers=4, **options)
    ours.train(training)
    theirs.train(training)
    x = 0.3 * torch.randn(shape)
    _, indices, _, _ = assert_same_step(ours, theirs, x, TERMS, return_all_codes=True)
    assert_same(ours.codebooks, theirs.codebooks, TERMS)
    output = theirs.get_output_from_indices(indices)
    assert_same(ours.get_output_from_indices(indices), output, TERMS)


def test_dropout_follows_a_given_seed() -> None:
    ours, theirs = pair(
        "ResidualSimVQ", dim=8, codebook_size=32, num_quantizers=6, quantize_dropout=True
    )
    x = 0.3 * torch.randn(1, 3, 8)
    depths = set()
    for seed in range(20):
        mine = ours(x, rand_quantize_dropout_fixed_seed=seed)
        assert torch.equal(mine[1], theirs(x, rand_quantize_dropout_fixed_seed=seed)[1])
        depths.add(int((mine[1] >= 0).sum(dim=-1)[0, 0]))
        coarse = ours.get_output_from_indices(mine[1][..., :2])
        assert_same(coarse, theirs.get_output_from_indices(mine[1][..., :2]), TERMS)
    assert depths == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_are_exact_for_the_transformed_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = SimVQ(8, 64).to(dtype)
    x = (0.3 * torch.randn(1, 500, 8)).to(dtype)
    quantized, indices, loss = module(x)
    expected = ordered_argmin(x[0], module.codebook.detach())
    assert torch.equal(indices[0], expected)
    assert torch.equal(quantized[0].detach(), module.codebook.detach()[expected])
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["SimVQ", "ResidualSimVQ"])
def test_rows_that_are_not_finite_and_empty_batches(name: str) -> None:
    torch.manual_seed(0)
    module = (
        SimVQ(4, 16)
        if name == "SimVQ"
        else ResidualSimVQ(dim=4, codebook_size=16, num_quantizers=3)
    )
    x = torch.randn(1, 5, 4)
    kept = torch.tensor([0, 1, 3])
    expected = module(x[:, kept])
    x[0, 2, 1], x[0, 4, 0] = torch.nan, torch.inf
    quantized, indices, loss = module(x.requires_grad_())
    assert torch.equal(quantized[0, kept], expected[0][0])
    assert torch.equal(indices[0, kept], expected[1][0])
    assert (indices[0, [2, 4]] == -1).all()
    assert quantized[0, [2, 4]].isnan().all()
    assert_same(loss, expected[2], terms=64)
    (quantized[0, kept].sum() + loss.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    quantized, indices, loss = module(torch.zeros(0, 5, 4))
    assert quantized.shape == (0, 5, 4)
    assert loss.abs().max() == 0.0


def test_compiled_copied_and_pickled() -> None:
    torch.manual_seed(0)
    module = ResidualSimVQ(dim=4, codebook_size=16, num_quantizers=2)
    x = torch.randn(1, 5, 4)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for other in (compiled, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        result = other(x)
        assert torch.equal(result[1], expected[1])
        assert_same(result[0].detach(), expected[0].detach(), terms=16)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="heads must be 1; got 2"):
        ResidualSimVQ(dim=4, codebook_size=16, num_quantizers=2, heads=2)
    with pytest.raises(ValueError, match="must have 4 channels in dimension 1"):
        SimVQ(4, 16, channel_first=True)(torch.zeros(1, 5, 5))
    with pytest.raises(ValueError, match="num_quantizers must be at least 1"):
        ResidualSimVQ(dim=4, codebook_size=16, num_quantizers=0)
    module = ResidualSimVQ(dim=4, codebook_size=16, num_quantizers=2)
    with pytest.raises(ValueError, match="quantize_dropout=True"):
        module.get_codes_from_indices(torch.zeros(1, 5, 1, dtype=torch.int64))
