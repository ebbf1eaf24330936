"""FSQ: the peer's results, the exact level on both sides of every step, and safety."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nn.peer import assert_same, assert_same_step, pair

from fastvq import FSQ

CASES = [
    ({"levels": [8, 5, 5, 5]}, (2, 9, 4)),
    ({"levels": (8, 6, 5), "dim": 16}, (2, 9, 16)),
    ({"levels": [3, 4], "num_codebooks": 3, "dim": 7, "projection_has_bias": False}, (2, 9, 7)),
    ({"levels": [2, 3, 4], "preserve_symmetry": True}, (2, 9, 3)),
    ({"levels": [2, 7], "preserve_symmetry": True, "bound_hard_clamp": True}, (2, 9, 2)),
    ({"levels": [5, 5], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 9, 2)),
    ({"levels": [4, 4, 4], "orthogonal_rotation": True}, (2, 9, 3)),
    ({"levels": [8, 5], "bound_hard_clamp": True}, (2, 9, 2)),
    ({"levels": [8, 5], "channel_first": True}, (2, 2, 9)),
    ({"levels": [8, 5]}, (2, 2, 3, 4)),
    ({"levels": [8, 5], "num_codebooks": 2, "dim": 6}, (2, 6, 2, 3, 4)),
    ({"levels": [8, 5], "return_indices": False}, (2, 3, 2)),
    ({"levels": [8, 5], "keep_num_codebooks_dim": True}, (2, 3, 2)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "shape"), CASES)
def test_same_as_the_peer(options: dict, shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair("FSQ", **options)
    ours.train(training)
    theirs.train(training)
    x = 1.5 * torch.randn(shape)
    # Longest sum: a projection over 16 channels, of values below 32.
    _, indices = assert_same_step(ours, theirs, x, terms=32)
    if indices is not None:
        codes = theirs.indices_to_codes(indices)
        assert_same(ours.indices_to_codes(indices), codes, terms=32)
        assert torch.equal(ours.implicit_codebook, theirs.implicit_codebook)
        levels = theirs.indices_to_level_indices(indices)
        assert torch.equal(ours.indices_to_level_indices(indices), levels)
        found = ours.codes_to_indices(ours._indices_to_codes(indices))
        assert torch.equal(found, indices)


def test_methods_of_the_peer() -> None:
    ours, theirs = pair("FSQ", levels=[8, 5, 4])
    z = torch.randn(7, 3)
    for hard in (False, True):
        assert_same(ours.bound(z, hard_clamp=hard), theirs.bound(z, hard_clamp=hard), terms=4)
        mine = ours.symmetry_preserving_bound(z, hard_clamp=hard)
        assert_same(mine, theirs.symmetry_preserving_bound(z, hard_clamp=hard), terms=4)
    assert_same(ours.quantize(z), theirs.quantize(z), terms=4)


def _float64_levels(z: torch.Tensor, count: int, symmetric: bool, hard: bool) -> torch.Tensor:
    """The level by the definition, in float64 arithmetic."""
    z = z.double()
    if symmetric:
        # ⌊(L−1)(b+1)/2 + ½⌋ ≥ l  ⇔  b ≥ (2l−1)/(L−1) − 1, without b + 1 rounding a tiny b away.
        bounded = z.clamp(-1, 1) if hard else z.tanh()
        least = (2 * torch.arange(1, count).double() - 1) / (count - 1) - 1
        return (bounded[:, None] >= least).sum(dim=1)
    height = (count - 1) * 1.001 / 2
    offset = 0.5 if count % 2 == 0 else 0.0
    shift = torch.tensor(offset / height, dtype=torch.float64)
    bounded = (z + shift).clamp(-1, 1) if hard else (z + shift.atanh()).tanh()
    return (bounded * height - offset).round() + count // 2


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("count", [3, 4, 5, 8, 16])
def test_level_of_every_half_precision_number(count: int, symmetric: bool, hard: bool) -> None:
    module = FSQ([count], preserve_symmetry=symmetric, bound_hard_clamp=hard).eval()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        z = bits.view(dtype)
        z = z[z.isfinite()]
        codes, indices = module(z[None, :, None])
        assert codes.dtype == dtype
        assert torch.equal(indices[0], _float64_levels(z, count, symmetric, hard).int())


@pytest.mark.parametrize("symmetric", [False, True])
def test_level_of_the_neighbours_of_every_step(symmetric: bool) -> None:
    levels = [8, 5, 16]
    module = FSQ(levels, preserve_symmetry=symmetric).eval()
    for channel, count in enumerate(levels):
        for level in range(1, count):
            step = module._snap.steps[channel, level - 1]
            at = step.float()
            below = at if at.double() < step else torch.nextafter(at, at.new_tensor(-torch.inf))
            above = torch.nextafter(below, below.new_tensor(torch.inf))
            z = torch.zeros(1, 2, 3)
            z[0, 0, channel], z[0, 1, channel] = below, above
            found = module.indices_to_level_indices(module(z)[1])[0, :, channel]
            assert found.tolist() == [level - 1, level]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [256, 257, 1000, 2**16, 2**16 + 1])
def test_level_among_many(count: int, symmetric: bool) -> None:
    """Both sides of every step, also where the bound is wider than the levels."""
    module = FSQ([count], preserve_symmetry=symmetric).eval()
    steps = module._snap.steps[0]
    above = steps.float()
    above = torch.where(
        above.double() < steps, torch.nextafter(above, torch.tensor(torch.inf)), above
    )
    below = torch.nextafter(above, torch.tensor(-torch.inf))
    ends = torch.tensor([-torch.inf, torch.inf])
    for z, dtype in ((torch.cat([above, below, ends]), torch.float32), (steps, torch.float64)):
        true = torch.searchsorted(steps, z.double(), right=True)
        assert torch.equal(module(z.to(dtype)[None, :, None])[1][0], true.int())


def test_index_of_a_large_codebook_is_exact() -> None:
    module = FSQ([1000, 1000, 1000]).eval()
    indices = torch.tensor([[0, 1, 999, 16777217, 123456789, 999999999]])
    levels = module.indices_to_level_indices(indices)
    codes = module._indices_to_codes(indices)
    assert torch.equal(module.codes_to_indices(codes), indices.int())
    assert (levels * torch.tensor([1, 10**3, 10**6])).sum(-1).tolist() == indices.tolist()


def test_a_row_that_is_not_a_number_costs_that_row_only() -> None:
    torch.manual_seed(0)
    module = FSQ([8, 5], dim=2)
    x = torch.randn(1, 6, 2)
    clean, indices = module(x)
    x[0, 2, 1] = torch.nan
    x[0, 4, 0] = torch.inf
    x.requires_grad_()
    quantized, found = module(x)
    kept = torch.tensor([0, 1, 3, 5])
    assert torch.equal(quantized[0, kept], clean[0, kept])
    assert torch.equal(found[0, kept], indices[0, kept])
    assert found[0, 2] == -1
    assert quantized[0, 2].isnan().tolist() == [False, True]
    assert quantized[0, 4, 0] == 0.75  # the last of eight levels
    quantized[0, kept].sum().backward()
    assert x.grad[0, kept].isfinite().all()


@pytest.mark.parametrize("lost", [torch.nan, torch.inf])
def test_a_lost_row_leaves_the_projections_alone(lost: float) -> None:
    torch.manual_seed(0)
    module = FSQ([8, 5], dim=6)
    x = torch.randn(1, 4, 6)
    module(x[:, :3])[0].sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    x[0, 3, 2] = lost
    quantized, indices = module(x)
    assert quantized[0, 3].isnan().all()
    assert indices[0, 3] == -1
    quantized[:, :3].sum().backward()
    for parameter, grad in zip(module.parameters(), expected):
        assert_same(parameter.grad, grad, terms=8)


def test_empty_batches() -> None:
    module = FSQ([8, 5], dim=6)
    quantized, indices = module(torch.zeros(0, 5, 6))
    assert (quantized.shape, indices.shape) == ((0, 5, 6), (0, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_module_moves_no_step(dtype: torch.dtype) -> None:
    module = FSQ([8, 5, 7])
    x = torch.randn(2, 50, 3).to(dtype)
    expected = module(x)
    cast = copy.deepcopy(module).to(dtype)
    quantized, indices = cast(x)
    assert torch.equal(indices, expected[1])
    assert torch.equal(quantized, expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x.float())[1], expected[1])


def test_noise_dropout_is_the_share_of_channels() -> None:
    module = FSQ([5, 5], preserve_symmetry=True, noise_dropout=0.1)
    x = torch.zeros(1, 20_000, 2)
    changed = (module(x)[0] != 0).float().mean().item()
    # Five standard deviations of a mean of 40,000 draws with probability 0.1.
    assert abs(changed - 0.1) < 5 * (0.1 * 0.9 / 40_000) ** 0.5


def test_compiled_exported_copied_and_pickled() -> None:
    torch.manual_seed(0)
    module = FSQ([8, 5], dim=6, num_codebooks=2)
    x = torch.randn(2, 9, 6)
    expected, indices = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(copy.deepcopy(module).eval(), (x,)).module()
    for other in (
        compiled,
        exported,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
    ):
        quantized, found = other(x)
        assert torch.equal(found, indices)
        assert_same(quantized.detach(), expected.detach(), terms=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": [2, 3]}, "levels must be at least 3"),
        ({"levels": [3], "noise_dropout": 0.5}, "preserve_symmetry=True"),
        ({"levels": [3], "num_codebooks": 2, "keep_num_codebooks_dim": False}, "num_codebooks=1"),
    ],
)
def test_refusals(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FSQ(**options)
    with pytest.raises(ValueError, match="must have 2 channels"):
        FSQ([3, 3])(torch.zeros(1, 4, 3))
