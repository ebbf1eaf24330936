"""VectorQuantize on inputs that hurt: NaN rows, empty batches, half precision, degenerate data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvq.nn.vector_quantize import VectorQuantize

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cosine": {"use_cosine_sim": True},
    "projected": {"codebook_dim": 3},
    "heads": {"heads": 2, "codebook_dim": 4},
    "separate_heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "learnable": {"learnable_codebook": True},
    "expiry": {"threshold_ema_dead_code": 2},
    "kmeans": {"kmeans_init": True},
    "drawn": {"stochastic_sample_codes": True, "rotation_trick": False},
    "diversity": {"codebook_diversity_loss_weight": 0.1},
    "orthogonal": {"orthogonal_reg_weight": 0.1, "orthogonal_reg_active_codes_only": True},
    "cross_entropy": {"commitment_use_cross_entropy_loss": True},
    "gumbel": {
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
    },
    "in_place": {
        "learnable_codebook": True,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
    },
}


def _state(module: VectorQuantize) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_nan_row_costs_that_row(option: str) -> None:
    """As if the row had been masked: the same state, loss, and everyone else's results."""
    clean = torch.randn(2, 9, 8)
    broken = clean.clone()
    broken[0, 4, 1], broken[1, 2] = torch.nan, torch.inf
    mask = broken.isfinite().all(dim=-1)
    results = []
    for x, call in ((broken, {}), (clean, {"mask": mask})):
        torch.manual_seed(0)
        module = VectorQuantize(8, 16, **OPTIONS[option])
        inputs = x.clone().requires_grad_()
        quantize, indices, loss = module(inputs, **call)
        (quantize[mask].sum() + loss).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((quantize, indices, loss, inputs.grad, grads, _state(module)))
    (q1, i1, l1, g1, p1, s1), (q2, i2, l2, g2, p2, s2) = results
    assert torch.equal(i1, i2)
    assert (i1[~mask] == -1).all()
    assert torch.equal(q1[mask], q2[mask])
    assert q1[~mask].isnan().all()
    assert torch.equal(l1, l2)
    assert torch.equal(g1[mask], g2[mask])
    assert g1[mask].isfinite().all()
    for name in p1:
        assert (p1[name] is None) == (p2[name] is None)
        assert p1[name] is None or torch.equal(p1[name], p2[name]), name
    for key in s1:
        assert torch.equal(s1[key], s2[key]), key
        assert s1[key].isfinite().all()


@pytest.mark.parametrize("batch", ["empty", "masked", "nan"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_batch_without_rows_changes_nothing(option: str, batch: str) -> None:
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, **OPTIONS[option])
    if option != "kmeans":
        module(torch.randn(2, 9, 8))
    before = _state(module)
    x = torch.randn(2, 0 if batch == "empty" else 9, 8)
    x = torch.full_like(x, torch.nan) if batch == "nan" else x
    mask = torch.zeros(2, 9, dtype=torch.bool) if batch == "masked" else None
    inputs = x.requires_grad_()
    quantize, indices, loss = module(inputs, mask=mask)
    assert loss.item() == 0.0
    assert (indices == -1).all()
    if batch == "masked":
        assert (quantize == 0).all()
    loss.backward()
    for parameter in module.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("how", ["half", "bfloat16", "autocast"])
@pytest.mark.parametrize("option", ["default", "cosine", "learnable", "expiry", "diversity"])
def test_half_precision_leaves_the_state_float32(option: str, how: str) -> None:
    """The same state and indices as a float32 module that is given the same rounded rows."""
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "autocast": torch.bfloat16}[how]
    torch.manual_seed(0)
    low = VectorQuantize(8, 16, **OPTIONS[option])
    torch.manual_seed(0)
    full = VectorQuantize(8, 16, **OPTIONS[option])
    if how != "autocast":
        low = low.to(dtype)
    for step in range(3):
        x = torch.randn(2, 9, 8).to(dtype)
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            quantize, indices, loss = low(x)
        torch.manual_seed(step)
        _, expected, expected_loss = full(x if option == "cosine" else x.float())
        assert quantize.dtype == dtype
        assert loss.dtype == torch.float32
        assert torch.equal(indices, expected)
        if option != "cosine":
            assert torch.equal(loss, expected_loss)
    for key, value in low.state_dict().items():
        assert value.dtype in (torch.float32, torch.bool)
        assert torch.equal(value, full.state_dict()[key]), key


def _degenerate(kind: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(12, 2, generator=generator)
    return {
        "constant": torch.full((12, 2), 3.0),
        "zero": torch.zeros(12, 2),
        "one_cluster": 5.0 + 1e-3 * noise,
        "tiny": 1e-30 * noise,
        "subnormal": 1e-42 * noise,
        "huge": 1e30 * noise,
        "largest": torch.finfo(torch.float32).max * noise.sign(),
        "drifting": noise + step,
        "alternating": noise * (1e20 if step % 2 else 1e-20),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "constant", "zero", "one_cluster", "tiny", "subnormal", "huge", "largest", "drifting",
        "alternating",
    ],
)  # fmt: skip
def test_degenerate_data_never_ruins_a_codebook(kind: str) -> None:
    """A long run with revival: state stays finite, and ordinary data is learned afterwards."""
    torch.manual_seed(0)
    module = VectorQuantize(2, 6, threshold_ema_dead_code=1, kmeans_init=kind == "tiny")
    with torch.no_grad():
        for step in range(10_000):
            module(_degenerate(kind, step))
            if step % 1000 == 0:
                assert all(value.isfinite().all() for value in module.state_dict().values())
        for step in range(60):
            x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
            _, indices, loss = module(x)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert len(indices.unique()) == 6
    assert loss < 0.5  # one code for all would leave the variance of 1


def test_gradients_stay_finite_on_degenerate_rows() -> None:
    for options in OPTIONS.values():
        torch.manual_seed(0)
        module = VectorQuantize(8, 16, **options)
        for rows in (torch.zeros(5, 8), torch.full((5, 8), 1e-30), torch.ones(5, 8)):
            x = rows.clone().requires_grad_()
            quantize, _, loss = module(x)
            (quantize.sum() + loss).backward()
            assert x.grad.isfinite().all()
