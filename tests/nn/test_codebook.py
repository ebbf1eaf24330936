"""Codebook: the EMA rule in float64, safety of the state, revival, and several processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.nn.codebook import Codebook

U = 2.0**-24


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _state(module: Codebook) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("heads", [1, 2])
def test_ema_follows_the_equation_in_float64(heads: int) -> None:
    k, d, decay, eps = 5, 3, 0.9, 0.05
    torch.manual_seed(0)
    module = Codebook(
        k, d, num_codebooks=heads, decay=decay, eps=eps, kmeans_init=False, revive_below=0.0
    )
    n, m, e = (getattr(module, key).double() for key in ("cluster_size", "embed_avg", "embed"))
    for step in range(6):
        x = _rows(heads, 40, d, seed=step)
        mask = _rows(40, seed=step + 100) > -0.5
        out = module(x if heads > 1 else x[0], mask)
        index = torch.cdist(x.double(), e).argmin(dim=2)
        index[:, ~mask] = -1
        assert torch.equal(out.indices.reshape(heads, -1), index)
        hits = torch.nn.functional.one_hot(index[:, mask], k).double()
        n = decay * n + (1 - decay) * hits.sum(dim=1)
        m = decay * m + (1 - decay) * hits.transpose(1, 2) @ x[:, mask].double()
        total = n.sum(dim=1, keepdim=True)
        e = m / (total * (n + eps) / (total + k * eps))[..., None]
        # Per step, u of the largest value met for each of: the batch's sum, two products, an
        # addition. A sum is at most 40 rows long, a count at most 40.
        bound_n = 4 * U * (step + 1) * 40
        bound_m = bound_n * 5.0  # |x| < 5
        assert (module.cluster_size - n).abs().max() <= bound_n
        assert (module.embed_avg - m).abs().max() <= bound_m
        # m and N with those errors, a sum of k counts, five more roundings in the divisor, one in
        # the quotient.
        bound_e = (bound_m + bound_n * e.abs().max()) / n.min() + (k + 6) * U * e.abs().max()
        assert (module.embed - e).abs().max() <= bound_e
        e = module.embed.double()  # the same codes decide the next step's indices


def test_losses_are_means_over_counted_rows_and_channels() -> None:
    module = Codebook(7, 4, learnable=True, kmeans_init=False, revive_below=0.0)
    x = _rows(30, 4).requires_grad_()
    mask = torch.arange(30) % 3 > 0
    codes = module.embed.detach()[0].clone()
    out = module(x, mask)
    expected = ((x.detach().double() - codes[out.indices].double()) ** 2)[mask].mean()
    # D squares of differences and N·D additions, all positive: relative (N·D + 4) u, and D more.
    bound = (30 * 4 + 8) * U * expected
    assert (out.commitment - expected).abs() <= bound
    assert (out.codebook - expected).abs() <= bound
    assert out.commitment.dtype == out.codebook.dtype == torch.float32
    (grad_x,) = torch.autograd.grad(out.commitment, x, retain_graph=True)
    (grad_codes,) = torch.autograd.grad(out.codebook, module.embed)
    residual = torch.where(mask[:, None], x.detach() - codes[out.indices], 0.0)
    torch.testing.assert_close(grad_x, 2 * residual / (mask.sum() * 4))
    expected_codes = torch.zeros_like(codes).index_add(0, out.indices.clamp(min=0), -residual)
    torch.testing.assert_close(grad_codes[0], 2 * expected_codes / (mask.sum() * 4))


def test_ema_has_no_codebook_loss() -> None:
    out = Codebook(7, 4)(_rows(30, 4).requires_grad_())
    assert out.codebook.item() == 0.0
    assert not out.codebook.requires_grad


def test_perplexity_and_usage() -> None:
    module = Codebook(4, 1, kmeans_init=False, revive_below=0.1).eval()
    module.embed.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0])[None, :, None])
    module.cluster_size.copy_(torch.tensor([[10.0, 5.0, 4.9, 0.1]]))
    x = torch.tensor([0.0, 0.1, 1.0, 3.0, torch.nan, 2.0])[:, None]
    out = module(x, torch.tensor([True] * 5 + [False]))
    assert out.indices.tolist() == [0, 0, 1, 3, -1, -1]
    # p = (1/2, 1/4, 1/4): exp(1.5 ln 2). A handful of roundings of values near 1.
    assert out.perplexity.item() == pytest.approx(2**1.5, rel=16 * U)
    assert out.usage.item() == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("learnable", [False, True])
def test_state_stays_float32(dtype: torch.dtype, learnable: bool) -> None:
    module = Codebook(6, 3, learnable=learnable, kmeans_init=False)
    before = _state(module)
    parent = torch.nn.Sequential(module).to(dtype)
    _assert_same_state(before, _state(module))  # to the bit: no detour through half precision
    out = module(_rows(20, 3).to(dtype))
    assert out.quantized.dtype == dtype
    for value in (module.embed, module.embed_avg, module.cluster_size):
        assert value.dtype == torch.float32
    assert out.commitment.dtype == torch.promote_types(dtype, torch.float32)
    parent.to("meta")
    assert module.embed.device.type == "meta"


@pytest.mark.parametrize("learnable", [False, True])
def test_a_broken_row_costs_only_itself(learnable: bool) -> None:
    x = _rows(25, 3)
    broken = x.clone()
    broken[4, 1], broken[9, 0] = float("nan"), float("inf")
    keep = torch.ones(25, dtype=torch.bool)
    keep[[4, 9]] = False
    results = []
    for rows, mask in ((broken, None), (x, keep)):
        torch.manual_seed(0)
        module = Codebook(6, 3, learnable=learnable)
        inputs = rows.clone().requires_grad_()
        for _ in range(3):
            out = module(inputs, mask)
        (out.commitment + out.codebook).backward()
        results.append((module, out, inputs.grad))
    (one, out_one, grad_one), (two, out_two, grad_two) = results
    _assert_same_state(_state(one), _state(two))
    assert torch.equal(out_one.indices, out_two.indices)
    assert torch.equal(out_one.quantized[keep], out_two.quantized[keep])
    assert torch.equal(grad_one, grad_two)
    for name in ("commitment", "codebook", "perplexity", "usage"):
        assert torch.equal(getattr(out_one, name), getattr(out_two, name)), name


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("initted", [False, True])
@pytest.mark.parametrize("batch", ["empty", "masked", "nan"])
def test_a_batch_without_counted_rows_changes_nothing(
    batch: str, initted: bool, learnable: bool
) -> None:
    module = Codebook(6, 3, learnable=learnable)
    if initted:
        module(_rows(50, 3))
        module(_rows(50, 3, seed=1))
    before = _state(module)
    x = _rows(0 if batch == "empty" else 8, 3)
    x = torch.full_like(x, torch.nan) if batch == "nan" else x
    out = module(
        x.requires_grad_(), torch.zeros(8, dtype=torch.bool) if batch == "masked" else None
    )
    _assert_same_state(before, _state(module))
    assert out.commitment.item() == 0.0
    assert out.codebook.item() == 0.0
    assert out.perplexity.item() == 1.0
    assert (out.indices == -1).all()
    out.commitment.backward()
    assert (x.grad == 0).all()


def test_eval_and_freeze_change_nothing() -> None:
    module = Codebook(6, 3)
    module(_rows(50, 3))
    before = _state(module)
    frozen = module(_rows(50, 3, seed=1), freeze=True)
    evaluated = module.eval()(_rows(50, 3, seed=1))
    _assert_same_state(before, _state(module))
    assert torch.equal(frozen.indices, evaluated.indices)


def test_kmeans_start_uses_the_first_batch() -> None:
    module = Codebook(4, 2, revive_below=0.0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    x = (centres[:, None] + 0.01 * _rows(4, 30, 2)).reshape(-1, 2)
    assert not module.initted
    assert module.eval()(x).quantized.isfinite().all()
    assert not module.initted
    out = module.train()(x)
    assert module.initted
    assert out.perplexity.item() == pytest.approx(4.0, rel=1e-5)
    assert out.commitment.item() < 0.001  # blobs 0.01 wide, 9 apart
    # A state that is loaded decides anew whether k-means is due.
    fresh = Codebook(4, 2)
    fresh.load_state_dict(module.state_dict())
    before = fresh.embed.clone()
    fresh(x + 100.0, freeze=True)
    fresh(x, freeze=False)
    assert (fresh.embed - before).abs().max() < 1.0


def test_kmeans_start_with_fewer_distinct_rows_than_codes() -> None:
    module = Codebook(16, 2)
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(10, 1)
    for _ in range(50):
        out = module(x)
    assert module.embed.isfinite().all()
    assert out.commitment.item() < 1e-9


@pytest.mark.parametrize("learnable", [False, True])
def test_dead_codes_restart_at_rows_and_keep_it(learnable: bool) -> None:
    torch.manual_seed(0)
    module = Codebook(8, 2, learnable=learnable, kmeans_init=False, decay=0.9)
    with torch.no_grad():
        module.embed.copy_(1000.0 + torch.arange(16.0).reshape(1, 8, 2))
    module.embed_avg.copy_(module.embed.detach())
    seen = torch.cat([_rows(64, 2, seed=step) for step in range(60)])
    for step in range(60):
        out = module(_rows(64, 2, seed=step))
    assert out.perplexity.item() > 4.0
    assert module.embed.abs().max() < 10.0  # no code is left at 1000
    # The step after a restart does not undo it: count, sum and code agree.
    module(_rows(64, 2), torch.zeros(64, dtype=torch.bool))
    if not learnable:
        n = module.cluster_size
        ratio = module.embed_avg / n[..., None]
        # What the smoothing changes: ε/N[k] + Kε/ΣN, relatively; and a few roundings.
        relative = module.eps * (1 / n.min() + 8 / n.sum()) + 16 * U
        assert (ratio - module.embed).abs().max() <= relative * module.embed.abs().max()
    else:
        rows = module.embed.detach()[0]
        is_row = (torch.cdist(rows, seen).min(dim=1).values == 0).sum()
        assert is_row >= 6  # nothing else has moved the parameter


def test_a_restart_outlives_the_next_update() -> None:
    module = Codebook(2, 1, kmeans_init=False, decay=0.5, revive_below=0.1)
    module.embed.copy_(torch.tensor([[[0.0], [50.0]]]))
    module.cluster_size.copy_(torch.tensor([[10.0, 0.5]]))
    module.embed_avg.copy_(module.embed * module.cluster_size[..., None])
    module(torch.full((20, 1), 7.0))
    assert module.embed[0, 1].item() == 7.0
    module(torch.full((20, 1), -100.0))  # all to the other code
    n = module.cluster_size[0]
    relative = module.eps * (1 / n.min() + 2 / n.sum()) + 16 * U  # the smoothing, and roundings
    assert module.embed[0, 1].item() == pytest.approx(7.0, rel=relative.item())


def test_restarts_are_random_rows_that_count() -> None:
    drawn = set()
    for seed in range(60):
        torch.manual_seed(seed)
        module = Codebook(2, 1, kmeans_init=False, decay=0.5, revive_below=0.5)
        module.embed.copy_(torch.tensor([[[0.0], [1e6]]]))
        x = torch.arange(10.0)[:, None]
        x[0] = torch.nan
        module(x, torch.arange(10) != 5)
        drawn.add(module.embed[0, 1].item())
    assert drawn == {1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0}


def test_threshold_in_rows_per_batch() -> None:
    module = Codebook(2, 1, kmeans_init=False, decay=0.5, revive_below=0.0, revive_below_count=0.4)
    module.embed.copy_(torch.tensor([[[0.0], [50.0]]]))
    module.embed_avg.copy_(module.embed)
    x = torch.ones(9, 1)
    module(x)
    assert module.embed[0, 1].item() > 49.0  # a count of 0.5 is enough
    module(x)
    assert module.embed[0, 1].item() == 1.0  # 0.25 is not
    assert module.cluster_size[0, 1].item() == pytest.approx(0.4, rel=U)


def test_training_resumes_from_the_state_dict() -> None:
    def run(module: Codebook, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            module(_rows(30, 3, seed=step) + step)

    whole = Codebook(12, 3)
    run(whole, 0, 20)
    half = Codebook(12, 3)
    run(half, 0, 10)
    resumed = Codebook(12, 3)
    resumed.load_state_dict(half.state_dict())
    run(resumed, 10, 20)
    _assert_same_state(_state(whole), _state(resumed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1; got 0"),
        ({"dim": 0}, "dim must"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\]; got 1.5"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"revive_below": 1.0}, "revive_below must"),
        ({"revive_below_count": -1.0}, "revive_below_count must"),
    ],
)
def test_refuses_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(**{"num_codes": 4, "dim": 2, **arguments})


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 3), (3,), (1, 1, 5, 3)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x must be"):
        Codebook(4, 3)(torch.zeros(shape))
