"""ResidualVQ and GroupedResidualVQ: the peer's results over several steps, exactness, safety."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn.peer import assert_same, assert_same_state, assert_same_step, pair
from ops.nearest_code_cases import ordered_argmin
from torch import Tensor

from fastvq import GroupedResidualVQ, ResidualVQ

SIZES = {"dim": 8, "codebook_size": 16, "num_quantizers": 4}
LEARNED = {"learnable_codebook": True, "ema_update": False}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ResidualVQ", {}),
    ("ResidualVQ", {"rotation_trick": False, "commitment_weight": 0.25, "decay": 0.99}),
    ("ResidualVQ", {"codebook_dim": 5}),
    ("ResidualVQ", {"codebook_size": (16, 8, 4), "num_quantizers": None}),
    ("ResidualVQ", {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1}),
    ("ResidualVQ", {"quantize_dropout": True, "quantize_dropout_multiple_of": 2}),
    ("ResidualVQ", {"shared_codebook": True}),
    ("ResidualVQ", {"shared_codebook": True, **LEARNED}),
    ("ResidualVQ", LEARNED),
    ("ResidualVQ", {"quant_grad_frac": 0.3}),
    ("ResidualVQ", {"use_cosine_sim": True}),
    ("GroupedResidualVQ", {"groups": 2}),
    ("GroupedResidualVQ", {"groups": 4, "quantize_dropout": True, "codebook_dim": 3}),
]
# Longest sum: a gradient to a code, a loss or an average over 18 vectors of 8 channels, through
# three steps of four levels.
TERMS = 12 * 18 * 8


@pytest.mark.parametrize(("name", "options"), CASES)
def test_same_as_the_peer_over_steps(name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, **{**SIZES, **options})
    call = {"return_all_codes": True} if name == "ResidualVQ" else {}
    for step in range(3):
        x = 0.7 * torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(step))
        assert_same_step(ours, theirs, x, TERMS, magnitude=1.0, **call)
        assert_same_state(ours, theirs, TERMS, magnitude=1.0)
    ours.eval()
    theirs.eval()
    quantized, indices, losses = ours(x)
    expected = theirs(x)
    assert torch.equal(indices, expected[1])
    assert_same(quantized.detach(), expected[0].detach(), TERMS)
    assert torch.equal(losses, expected[2])
    output = theirs.get_output_from_indices(indices)
    assert_same(ours.get_output_from_indices(indices), output, TERMS)
    codes = theirs.get_codes_from_indices(indices)
    assert_same(ours.get_codes_from_indices(indices), codes, TERMS)
    for mine, yours in zip(ours.codebooks, theirs.codebooks):
        assert_same(mine.detach(), yours.detach(), TERMS, magnitude=1.0)


@pytest.mark.parametrize("zeros", [True, False])
def test_masked_like_the_peer(zeros: bool) -> None:
    ours, theirs = pair("ResidualVQ", **SIZES, return_zeros_for_masked_padding=zeros)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = 0.7 * torch.randn(2, 9, 8, generator=generator)
        mask = torch.rand(2, 9, generator=generator) > 0.3
        _, indices, _ = assert_same_step(ours, theirs, x, TERMS, magnitude=1.0, mask=mask)
        assert ((indices >= 0).all(dim=-1) == mask).all()
        assert_same_state(ours, theirs, TERMS, magnitude=1.0)


def test_frozen_like_the_peer() -> None:
    ours, theirs = pair("ResidualVQ", **SIZES)
    before = copy.deepcopy(ours.state_dict())
    x = 0.7 * torch.randn(2, 9, 8)
    assert_same_step(ours, theirs, x, TERMS, freeze_codebook=True)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_one_vector_an_example_like_the_peer() -> None:
    ours, theirs = pair("ResidualVQ", **SIZES)
    _, indices, _ = assert_same_step(ours, theirs, 0.7 * torch.randn(5, 8), TERMS)
    assert indices.shape == (5, 4)


def test_dropout_follows_a_given_seed() -> None:
    ours, theirs = pair("ResidualVQ", **SIZES, quantize_dropout=True)
    x = 0.7 * torch.randn(1, 3, 8)
    depths = set()
    for seed in range(20):
        call = {"freeze_codebook": True, "rand_quantize_dropout_fixed_seed": seed}
        indices = ours(x, **call)[1]
        assert torch.equal(indices, theirs(x, **call)[1])
        depths.add(int((indices >= 0).sum(dim=-1)[0, 0]))
        coarse = theirs.get_output_from_indices(indices[..., :2])
        assert_same(ours.get_output_from_indices(indices[..., :2]), coarse, TERMS)
    assert depths == {1, 2, 3, 4}


def _levels(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1 by the definition of every index, in float32 residuals."""
    residual, total, indices = x, torch.zeros_like(x), []
    for book in codebooks:
        index = ordered_argmin(residual, book)
        residual, total = residual - book[index], total + book[index]
        indices.append(index)
    return total, torch.stack(indices, dim=-1)


@pytest.mark.parametrize("training", [True, False])
def test_every_index_is_exact_for_its_residual(training: bool) -> None:
    torch.manual_seed(0)
    module = ResidualVQ(dim=8, codebook_size=64, num_quantizers=5).train(training)
    x = torch.randn(2, 150, 8)
    expected, indices = _levels(x.reshape(-1, 8), module.codebooks.clone())
    quantized, found, _ = module(x)
    assert torch.equal(found.reshape(-1, 5), indices)
    assert torch.equal(quantized.reshape(-1, 8), expected)


def test_half_precision_keeps_float32_residuals() -> None:
    torch.manual_seed(0)
    module = ResidualVQ(dim=8, codebook_size=64, num_quantizers=5)
    x = torch.randn(2, 50, 8).bfloat16()
    expected = copy.deepcopy(module)(x.float())
    autocast = copy.deepcopy(module)
    cast = copy.deepcopy(module).bfloat16()
    quantized, indices, losses = cast(x)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, expected[0].bfloat16())
    assert torch.equal(indices, expected[1])
    assert torch.equal(losses, expected[2])
    assert cast.layers[0]._codebook.embed.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(autocast(x.float())[1], expected[1])


@pytest.mark.parametrize("training", [True, False])
def test_pictures(training: bool) -> None:
    torch.manual_seed(0)
    options = {"codebook_size": 16, "num_quantizers": 3}
    rows = ResidualVQ(dim=8, codebook_dim=5, **options).train(training)
    maps = ResidualVQ(dim=8, codebook_dim=5, accept_image_fmap=True, **options).train(training)
    maps.load_state_dict(rows.state_dict())
    x = torch.randn(2, 8, 3, 4)
    quantized, indices, losses, codes = maps(x, return_all_codes=True)
    expected = rows(x.flatten(2).transpose(1, 2))
    assert torch.equal(quantized.flatten(2).transpose(1, 2), expected[0])
    assert torch.equal(indices, expected[1].unflatten(1, (3, 4)))
    assert torch.equal(losses, expected[2])
    assert codes.shape == (3, 2, 3, 4, 5)
    if not training:
        assert_same(maps.get_output_from_indices(indices).detach(), quantized.detach(), TERMS)
    grouped = GroupedResidualVQ(dim=8, groups=2, accept_image_fmap=True, **options).eval()
    quantized, indices, losses = grouped(x)
    assert (quantized.shape, indices.shape, losses.shape) == (x.shape, (2, 2, 3, 4, 3), (2, 3))
    assert_same(grouped.get_output_from_indices(indices), quantized, TERMS)


@pytest.mark.parametrize("training", [True, False])
def test_cross_entropy_of_given_indices(training: bool) -> None:
    torch.manual_seed(0)
    module = ResidualVQ(**SIZES).train(training)
    x = 0.7 * torch.randn(2, 9, 8)
    wanted = torch.randint(0, 16, (2, 9, 4))
    books = module.codebooks.clone()
    residual, expected = x.reshape(-1, 8), 0.0
    for level, book in enumerate(books):
        score = -torch.cdist(residual.double(), book.double())
        expected = expected + F.cross_entropy(score, wanted[..., level].flatten())
        residual = residual - book[score.argmax(dim=-1)]
    expected_quantized = x.reshape(-1, 8) - residual
    quantized, loss = module(x.requires_grad_(), indices=wanted)
    # A score of size s, from terms of 8 channels, in the difference of two of them.
    assert abs(loss.item() - expected.item()) < 4 * 16 * 16 * 2.0**-24 * 8
    assert_same(quantized.reshape(-1, 8), expected_quantized.detach(), TERMS)
    loss.backward()
    assert x.grad.abs().sum() > 0
    listed = module.eval()(x, indices=list(wanted))
    assert torch.equal(listed[1], module(x, indices=wanted)[1])
    groups = GroupedResidualVQ(**SIZES, groups=2).eval()
    _, loss = groups(x, indices=[wanted, wanted])
    parts = [rvq(part, indices=wanted)[1] for rvq, part in zip(groups.rvqs, x.chunk(2, dim=-1))]
    assert_same(loss.detach(), (parts[0] + parts[1]).detach(), terms=4)


def test_a_row_that_is_not_finite_costs_that_row_only() -> None:
    torch.manual_seed(0)
    kept = torch.tensor([0, 1, 3, 5])
    x = torch.randn(1, 6, 8)
    for options in ({}, {"codebook_dim": 5}, {"shared_codebook": True, **LEARNED}):
        module = ResidualVQ(**SIZES, **options)
        expected = copy.deepcopy(module)
        clean = expected(x[:, kept])
        hurt = x.clone()
        hurt[0, 2, 1], hurt[0, 4, 0] = torch.nan, torch.inf
        quantized, indices, losses = module(hurt.requires_grad_())
        assert_same(quantized[0, kept].detach(), clean[0][0].detach(), terms=32)
        assert torch.equal(indices[0, kept], clean[1][0])
        assert (indices[0, [2, 4]] == -1).all()
        assert quantized[0, [2, 4]].isnan().all()
        assert_same(losses.detach(), clean[2].detach(), terms=64)
        assert_same_state(module, expected, terms=64)
        (quantized[0, kept].sum() + losses.sum()).backward()
        assert hurt.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_empty_and_masked_batches_change_nothing() -> None:
    module = ResidualVQ(**SIZES, threshold_ema_dead_code=2)
    before = copy.deepcopy(module.state_dict())
    quantized, indices, losses = module(torch.zeros(0, 5, 8))
    assert (quantized.shape, indices.shape) == ((0, 5, 8), (0, 5, 4))
    assert losses.abs().max() == 0.0
    module(torch.randn(2, 3, 8), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.eval()(torch.zeros(0, 5, 8))[1].shape == (0, 5, 4)


def test_shared_codebook_revives_at_rows_of_any_level() -> None:
    torch.manual_seed(0)
    module = ResidualVQ(**SIZES, shared_codebook=True, threshold_ema_dead_code=1)
    assert len({layer._codebook for layer in module.layers}) == 1
    book = module.layers[0]._codebook
    for _ in range(20):
        module(torch.randn(4, 32, 8))
    assert (book.cluster_size >= 1).all()
    assert torch.equal(module.codebooks[0], module.codebooks[3])


def test_kmeans_start_of_every_level() -> None:
    torch.manual_seed(0)
    module = ResidualVQ(**SIZES, kmeans_init=True)
    x = torch.randn(4, 64, 8)
    quantized, _, losses = module(x)
    assert all(layer._codebook.initted for layer in module.layers)
    assert (losses[1:] < losses[:-1]).all()
    assert (x - quantized).square().mean() < 0.5 * x.square().mean()


@pytest.mark.parametrize("training", [True, False])
def test_compiled_copied_and_pickled(training: bool) -> None:
    torch.manual_seed(0)
    module = ResidualVQ(dim=8, codebook_size=16, num_quantizers=2).train(training)
    x = torch.randn(1, 5, 8)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module)]
    others[2] = torch.compile(others[2], fullgraph=True, backend="aot_eager")
    expected = module(x)
    for other in others:
        result = other(x)
        assert torch.equal(result[1], expected[1])
        assert_same(result[0].detach(), expected[0].detach(), terms=16)
        assert_same(result[2].detach(), expected[2].detach(), terms=16)
    if not training:
        exported = torch.export.export(copy.deepcopy(module), (x,)).module()
        assert torch.equal(exported(x)[1], expected[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 2}, "heads must be 1; got 2. Use GroupedResidualVQ"),
        ({"diveq": True}, "diveq=True is out of fastvq's scope"),
        ({"implicit_neural_codebook": True}, "docs/migration.md"),
        ({"affine_param": True}, "affine_param=True"),
        ({"beam_size": 2}, "beam_size=2 is out of fastvq's scope"),
        ({"beam_score_quantizer_weights": [1.0, 1.0, 1.0, 1.0]}, "beam_score_quantizer_weights"),
        ({"codebook_size": (4, 8), "num_quantizers": 3}, "num_quantizers=3"),
        ({"num_quantizers": None}, "num_quantizers must be given"),
        ({"codebook_size": (4, 8), "num_quantizers": 2, "shared_codebook": True}, "one codebook"),
        ({"quantize_dropout": True, "quantize_dropout_cutoff_index": 4}, "cutoff_index"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ResidualVQ(**{**SIZES, **options})


def test_refusals_of_forward() -> None:
    module = ResidualVQ(**SIZES)
    with pytest.raises(ValueError, match="8 channels in dimension -1"):
        module(torch.zeros(1, 5, 7))
    with pytest.raises(ValueError, match="mask must be bool"):
        module(torch.zeros(1, 5, 8), mask=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="indices must be"):
        module(torch.zeros(1, 5, 8), indices=torch.zeros(1, 5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="beam_size"):
        module(torch.zeros(1, 5, 8), beam_size=4)
    with pytest.raises(ValueError, match="dropped"):
        module(torch.zeros(1, 5, 8), indices=torch.full((1, 5, 4), -1))
    with pytest.raises(ValueError, match="must hold 2 groups"):
        GroupedResidualVQ(**SIZES, groups=2)(torch.zeros(1, 5, 8), indices=[torch.zeros(1)])
