"""The kernels of one code of a prior: products, attention, the draw and its doubt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import UNIT_ROUNDOFF, assert_within
from torch import Tensor

from fastvq.sampling.draw import Filter, draw, exact_draw, logit_tolerance
from fastvq.sampling.noise import gumbel_noise, sample_states

kernels = pytest.importorskip("fastvq.kernels.triton.sample_row", reason="needs triton")
Columns = kernels.Columns
WIDTH = 3
RULES = [
    Filter(),
    Filter(0.02),
    Filter(0.0),
    Filter(1.0, 5),
    Filter(1.0, 1),
    Filter(1.0, None, 0.6),
    Filter(0.3, 12, 0.9),
]


def _gate_bound(terms: Tensor) -> Tensor:
    """Error of a gate computed from features off by `terms`: its slope is at most 1, and its own
    arithmetic, an exponential of up to 20 by a rounded log₂e and a few operations, adds 64 u."""
    return terms + 64 * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_of_dilated_taps(n: int, dtype: torch.dtype, device: str) -> None:
    channels, taps, dilation, column = 19, 2, 2, 1
    x = torch.randn(n, dilation + WIDTH, channels, device=device)
    weight = torch.randn(2 * channels, taps, channels, device=device).to(dtype)
    terms = torch.randn(WIDTH, n, 2 * channels, device=device)
    y = torch.full((n, channels), torch.nan, device=device)
    position = torch.tensor([2 * WIDTH + column], device=device)
    kernels.row_product(
        Columns(x, x.stride(0), channels),
        weight,
        Columns(terms, terms.stride(1), terms.stride(0)),
        Columns(y, channels),
        position,
        WIDTH,
        taps=taps,
        dilation=dilation,
        gated=True,
    )
    seen = x[:, [column, column + dilation]].double()
    summed = torch.einsum("stc,otc->so", seen, weight.double()) + terms[column].double()
    sizes = torch.einsum("stc,otc->so", seen.abs(), weight.double().abs())
    values, gates = summed.chunk(2, dim=1)
    # Sums of taps·channels products and a term, in any order; of bfloat16 weights three each.
    count = (3 if dtype == torch.bfloat16 else 1) * taps * channels + 2
    error = (count * UNIT_ROUNDOFF[torch.float32] * (sizes + terms[column].abs())).chunk(2, dim=1)
    assert_within(y, values.tanh() * gates.sigmoid(), _gate_bound(error[0] + error[1]))


def test_a_rectified_product_with_residual_and_a_head(device: str) -> None:
    n, inputs, outputs, split = 2, 5, 21, 4
    x, weight = torch.randn(n, inputs), torch.randn(outputs, 1, inputs)
    terms, residual = torch.randn(4, outputs), torch.randn(n, WIDTH, outputs)
    x, weight, terms, residual = (t.to(device) for t in (x, weight, terms, residual))
    y = torch.zeros(n, 4, outputs - split, device=device)
    head = torch.zeros(n, split, device=device)
    kernels.row_product(
        Columns(x, inputs),
        weight,
        Columns(terms, 0, position=outputs),
        Columns(y, y.stride(0), position=y.stride(1)),
        torch.tensor([3], device=device),
        WIDTH,
        rectified=True,
        residual=Columns(residual, residual.stride(0), outputs),
        head=head,
    )
    expected = x.double().relu() @ weight[:, 0].double().T + terms[3] + residual[:, 0]
    sizes = (
        x.double().relu() @ weight[:, 0].double().abs().T + terms[3].abs() + residual[:, 0].abs()
    )
    bound = (inputs + 3) * UNIT_ROUNDOFF[torch.float32] * sizes
    assert_within(torch.cat([head, y[:, 3]], dim=1), expected, bound)
    assert y[:, :3].count_nonzero() == 0


def test_a_query_sees_what_came_before(device: str) -> None:
    n, heads, size, positions, position = 1, 2, 3, 130, 66  # past one block of positions
    query = torch.randn(n, heads * size, device=device)
    cache = torch.randn(n, positions, 2 * heads * size, device=device)
    cache[:, position + 1 :] = torch.nan
    y = torch.zeros_like(query)
    kernels.attend(query, cache, y, torch.tensor([position], device=device), heads)
    seen = cache[:, : position + 1].double().unflatten(2, (2, heads, size))
    keys, values = seen.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(
        query.double().view(n, heads, 1, size), keys, values
    ).view_as(y)
    # Scores off by (size + 2)·u·Σ|terms| change a weight by twice that; the sums add one u a term.
    scores = (query.view(n, heads, 1, size).abs() * keys.abs()).sum(dim=-1).max()
    relative = 2 * (size + 2) * float(scores) + 2 * positions
    bound = relative * UNIT_ROUNDOFF[torch.float32] * float(values.abs().max())
    assert_within(y, expected, torch.full_like(expected, bound))


def _rows(num_codes: int) -> Tensor:
    """Logits in which many draws and many borders of top-k and top-p are close."""
    logits = (
        torch.randn(10, num_codes) * torch.tensor([0.0, 1e-4, 1.0, 1.0, 30.0]).repeat(2)[:, None]
    )
    logits[:, 7] = logits[:, 3]
    logits[::2, 11] = logits[::2].max(dim=1).values - 1e-5
    logits[5:] = (logits[5:] * 8).round() / 8
    return logits


@pytest.mark.parametrize("rule", RULES)
def test_draws_and_doubts(rule: Filter, device: str) -> None:
    num_codes, position = 21, 4
    logits = _rows(num_codes).to(device)
    n = len(logits)
    samples = torch.arange(5, 5 + n, device=device)
    noise = None
    if rule.temperature:
        at = torch.tensor([position], device=device)
        noise = gumbel_noise(3, samples, 1, at, num_codes)[0]
    codes, doubts = _draw(logits, sample_states(3, samples, 1), rule, position)
    certain = ~doubts
    assert torch.equal(codes[certain], exact_draw(logits, noise, rule)[certain])
    # Whatever errors within the tolerance do, a draw without doubt stays.
    for _ in range(20):
        moved = logits.double() + logit_tolerance(logits) * (2 * torch.rand_like(logits) - 1)
        assert torch.equal(exact_draw(moved, noise, rule)[certain], codes[certain])
    # And it doubts no more than Python's, but where a code beside the border decides.
    assert int((doubts & ~draw(logits, noise, rule).doubtful).sum()) <= 1
    assert certain.any()


def _draw(logits: Tensor, states: Tensor, rule: Filter, position: int) -> tuple[Tensor, Tensor]:
    n, num_codes = logits.shape
    height = position // WIDTH + 1
    codes = torch.full((n, height, WIDTH), -1, device=logits.device)
    doubts = torch.zeros(codes.shape, dtype=torch.int8, device=logits.device)
    embedding = torch.randn(num_codes, 5, device=logits.device)
    first = torch.zeros(n, WIDTH, 5, device=logits.device)
    top_p = 1.0 if rule.top_p is None else rule.top_p
    kernels.draw_code(
        logits,
        states,
        codes,
        doubts,
        embedding,
        Columns(first, first.stride(0), 5),
        torch.tensor([position], device=logits.device),
        torch.tensor([rule.temperature, top_p], dtype=torch.float64, device=logits.device),
        greedy=rule.temperature == 0,
        top_k=rule.top_k,
        top_p=top_p < 1,
    )
    row, column = divmod(position, WIDTH)
    drawn = codes[:, row, column]
    assert int((codes >= 0).sum()) == n  # nothing else was written
    assert torch.equal(first[:, column], embedding[drawn])
    return drawn, doubts[:, row, column].bool()


def test_what_is_not_finite_is_in_doubt(device: str) -> None:
    logits = torch.zeros(3, 9, device=device)
    logits[0, 4], logits[1, 2] = torch.nan, torch.inf
    logits[2, 5] = 100.0
    states = torch.zeros(3, dtype=torch.int64, device=device)
    codes, doubts = _draw(logits, states, Filter(0.5, 3, 0.9), 0)
    assert doubts.tolist() == [True, True, False]
    assert ((codes >= 0) & (codes < 9)).all()


def test_a_known_code_stays(device: str) -> None:
    logits = torch.zeros(2, 4, device=device)
    codes = torch.tensor([[[3]], [[1]]], device=device)
    doubts = torch.zeros(2, 1, 1, dtype=torch.int8, device=device)
    embedding, first = torch.randn(4, 6, device=device), torch.zeros(2, 1, 6, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    rule = torch.tensor([1.0, 1.0], dtype=torch.float64, device=device)
    for given in (logits, None):
        first.zero_()
        kernels.draw_code(
            *(given, zero.repeat(2), codes, doubts, embedding, Columns(first, 6), zero, rule),
            greedy=False,
            top_k=None,
            top_p=False,
        )
        assert codes.flatten().tolist() == [3, 1]
        assert torch.equal(first[:, 0], embedding[[3, 1]])
        assert doubts.count_nonzero() == 0
