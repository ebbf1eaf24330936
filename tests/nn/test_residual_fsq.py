"""ResidualFSQ, ResidualLFQ and their groups: the peer's results, dropout, and safety."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from nn.peer import assert_same, assert_same_step, pair

import fastvq

FSQ = {"levels": [8, 5, 5, 3], "num_quantizers": 4}
LFQ = {"dim": 4, "codebook_size": 16, "num_quantizers": 3}
DROPOUT = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1}
CASES = [
    ("ResidualFSQ", FSQ, (2, 9, 4)),
    ("ResidualFSQ", {**FSQ, "dim": 7}, (2, 9, 7)),
    ("ResidualFSQ", {**FSQ, **DROPOUT}, (2, 9, 4)),
    ("ResidualFSQ", {**FSQ, "is_channel_first": True}, (2, 4, 9)),
    ("ResidualFSQ", {**FSQ, "is_channel_first": True}, (2, 4, 3, 5)),
    ("ResidualFSQ", {**FSQ, "bound_hard_clamp": False}, (2, 9, 4)),
    ("ResidualFSQ", {**FSQ, "bound_hard_clamp": False, "soft_clamp_input_value": 1.5}, (2, 9, 4)),
    (
        "GroupedResidualFSQ",
        {"levels": [8, 5], "num_quantizers": 3, "dim": 8, "groups": 2},
        (2, 9, 8),
    ),
    ("ResidualLFQ", LFQ, (2, 9, 4)),
    ("ResidualLFQ", {**LFQ, "dim": 7}, (2, 9, 7)),
    ("ResidualLFQ", {**LFQ, **DROPOUT, "commitment_loss_weight": 0.3}, (2, 9, 4)),
    ("ResidualLFQ", {**LFQ, "soft_clamp_input_value": 2.0}, (2, 9, 4)),
    ("GroupedResidualLFQ", {**LFQ, "dim": 8, "groups": 2}, (2, 9, 8)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_same_as_the_peer(name: str, options: dict, shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair(name, **options)
    ours.train(training)
    theirs.train(training)
    x = 0.7 * torch.randn(shape)
    # Longest sums: 16 codes, 18 vectors. An entropy's gradient has terms of 2τ·ln 1e5, τ = 100.
    magnitude = 200 * math.log(1e5) if "LFQ" in name else None
    call = {} if options.get("is_channel_first") else {"return_all_codes": True}
    indices = assert_same_step(ours, theirs, x, 256, magnitude, **call)[1]
    if options.get("is_channel_first"):
        indices = indices.movedim(1, -1)
    assert_same(ours.codebooks, theirs.codebooks, terms=0)
    output = theirs.get_output_from_indices(indices)
    assert_same(ours.get_output_from_indices(indices), output, terms=64)


@pytest.mark.parametrize("name", ["ResidualFSQ", "ResidualLFQ"])
def test_dropout_follows_a_given_seed(name: str) -> None:
    options = {**(FSQ if name == "ResidualFSQ" else LFQ), "num_quantizers": 7}
    ours, theirs = pair(name, **options, quantize_dropout=True, quantize_dropout_multiple_of=3)
    x = 0.7 * torch.randn(1, 3, 4)
    depths = set()
    for seed in range(20):
        indices = ours(x.requires_grad_(), rand_quantize_dropout_fixed_seed=seed)[1]
        assert torch.equal(indices, theirs(x, rand_quantize_dropout_fixed_seed=seed)[1])
        depths.add(int((indices >= 0).sum(dim=-1)[0, 0]))
    assert depths == {3, 6, 7}
    with torch.no_grad():
        assert (ours(x)[1] >= 0).all()


@pytest.mark.parametrize("name", ["ResidualFSQ", "ResidualLFQ"])
def test_output_of_the_indices_is_the_output(name: str) -> None:
    options = FSQ if name == "ResidualFSQ" else LFQ
    for more in ({}, {"orthogonal_rotation": True}, {"spherical": True}):
        if "spherical" in more and name == "ResidualFSQ":
            continue
        torch.manual_seed(0)
        module = getattr(fastvq, name)(**{**options, "dim": 6}, **more).eval()
        out, indices, *_ = module(torch.randn(2, 9, 6))
        assert_same(module.get_output_from_indices(indices).detach(), out.detach(), terms=64)


@pytest.mark.parametrize("name", ["ResidualFSQ", "ResidualLFQ"])
def test_half_precision_gives_the_indices_of_float32(name: str) -> None:
    module = getattr(fastvq, name)(**(FSQ if name == "ResidualFSQ" else LFQ))
    x = (0.7 * torch.randn(2, 50, 4)).bfloat16()
    expected = module(x.float())
    cast = copy.deepcopy(module).bfloat16()(x)
    assert torch.equal(cast[1], expected[1])
    assert torch.equal(cast[0], expected[0].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x.float())[1], expected[1])


@pytest.mark.parametrize("name", ["ResidualFSQ", "ResidualLFQ"])
def test_safety(name: str) -> None:
    torch.manual_seed(0)
    module = getattr(fastvq, name)(**(FSQ if name == "ResidualFSQ" else LFQ))
    x = 0.7 * torch.randn(1, 4, 4)
    expected = module(x)
    kept = torch.tensor([0, 1, 3])
    x[0, 2] = torch.nan
    quantized, indices, *_ = module(x)
    assert torch.equal(quantized[0, kept], expected[0][0, kept])
    assert torch.equal(indices[0, kept], expected[1][0, kept])
    assert (indices[0, 2] == -1).all()
    assert module(torch.zeros(0, 4, 4))[0].shape == (0, 4, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for other in (compiled, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[1], indices)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bound_hard_clamp=False"):
        fastvq.ResidualFSQ(**FSQ, soft_clamp_input_value=1.0)
    with pytest.raises(ValueError, match="Use GroupedResidualFSQ"):
        fastvq.ResidualFSQ(**FSQ, num_codebooks=2)
    with pytest.raises(ValueError, match="Use GroupedResidualLFQ"):
        fastvq.ResidualLFQ(**LFQ, num_codebooks=2)
    with pytest.raises(ValueError, match="cutoff_index must be in 0 … 2; got 3"):
        fastvq.ResidualLFQ(**LFQ, quantize_dropout=True, quantize_dropout_cutoff_index=3)
    with pytest.raises(ValueError, match="multiple of groups"):
        fastvq.GroupedResidualLFQ(**{**LFQ, "dim": 9}, groups=2)
