"""vector-quantize-pytorch's own modules before and after `replace_modules`, where installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

import fastvq
from fastvq.nn import SimVQ, VectorQuantize

theirs = pytest.importorskip("vector_quantize_pytorch")

DIM, CODES = 16, 32
VECTORS = (3, 20, DIM)
OPTIONS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, VECTORS),
    ({"rotation_trick": False, "decay": 0.99, "eps": 1e-3}, VECTORS),
    ({"use_cosine_sim": True}, VECTORS),
    ({"codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True}, VECTORS),
    ({"codebook_dim": 8, "layernorm_after_project_in": True}, VECTORS),
    ({"heads": 2, "codebook_dim": 8, "channel_last": False}, (3, DIM, 20)),
    ({"accept_image_fmap": True, "commitment_weight": 0.25}, (2, DIM, 4, 5)),
    ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 4)),
    ({"learnable_codebook": True, "ema_update": False}, VECTORS),
    ({"orthogonal_reg_weight": 0.3}, VECTORS),
    # With codes that move, that library's gradient of these two is taken at the moved codes.
    ({"codebook_diversity_loss_weight": 0.3, "freeze_codebook": True}, VECTORS),
    ({"commitment_use_cross_entropy_loss": True, "freeze_codebook": True}, VECTORS),
    ({"freeze_codebook": True}, VECTORS),
]


def swapped(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module in a model, and a replaced copy of the model."""
    host = nn.ModuleDict({"q": module})
    ours = copy.deepcopy(host)
    reports = fastvq.replace_modules(ours)
    assert reports
    assert all(report.replaced for report in reports), "\n".join(map(str, reports))
    return host, ours


def assert_close(got: Any, expected: Any, terms: int) -> None:
    """Integers equal; floats within the rounding of sums of `terms` terms, relative to the largest.

    4·n·u on each side: a few sums in a row, as in the other tests of replacement.
    """
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for mine, other in zip(got, expected):
            assert_close(mine, other, terms)
    elif expected is None:
        assert got is None
    elif expected.is_floating_point():
        assert got.shape == expected.shape
        size = 1.0 + expected.abs().max().item()
        bound = 4 * 2 * terms * UNIT_ROUNDOFF[torch.float32] * size
        assert (got - expected).abs().max().item() <= bound
    else:
        assert torch.equal(got, expected)


def assert_steps_equal(host: nn.Module, ours: nn.Module, shape: tuple[int, ...]) -> None:
    """Outputs, gradients and state of three training steps, and an evaluation."""
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        x = torch.randn(shape, generator=generator)
        results = []
        for model in (host, ours):
            model.train(step < 3)
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            outputs = model["q"](leaf)
            parts: list[Any] = [*outputs]
            if step < 3:
                loss = (outputs[0] * x.cos()).sum() + outputs[2].sum()
                loss.backward()
                parts.append(leaf.grad)
                parts += [parameter.grad for parameter in model.parameters()]
            results.append([*parts, *model.state_dict().values()])
        assert_close(results[1], results[0], 3 * x.numel())


@pytest.mark.parametrize(("options", "shape"), OPTIONS, ids=lambda value: str(value)[:40])
def test_training_steps_are_equal(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    host, ours = swapped(theirs.VectorQuantize(DIM, CODES, **options))
    assert type(ours["q"]) is VectorQuantize
    assert list(ours.state_dict()) == list(host.state_dict())
    assert_steps_equal(host, ours, shape)


@pytest.mark.parametrize(
    "options", [{}, {"shared_codebook": True}, {"quantize_dropout": True, "codebook_dim": 8}]
)
def test_a_residual_quantizer_runs_on_what_was_put_into_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    host, ours = swapped(
        theirs.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, **options)
    )
    assert_steps_equal(host, ours, VECTORS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel_first": True, "rotation_trick": False},
        {"codebook_transform": nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, DIM))}
        | {"frozen_codebook_dim": 5, "commitment_weight": 0.5},
    ],
    ids=lambda options: ", ".join(options),
)
def test_sim_vq(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    host, ours = swapped(theirs.SimVQ(DIM, CODES, **options))
    assert type(ours["q"]) is SimVQ
    channel_first = options.get("channel_first", False)
    assert_steps_equal(host, ours, (3, DIM, 20) if channel_first else VECTORS)
    indices = torch.randint(0, CODES, (2, 5))
    codes = [model["q"].indices_to_codes(indices) for model in (ours, host)]
    torch.testing.assert_close(codes[0], codes[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [("FSQ", {"levels": [8, 5, 5], "dim": DIM}), ("LFQ", {"dim": DIM, "codebook_size": CODES})],
)
def test_quantizers_without_a_search_are_left(name: str, options: dict[str, Any]) -> None:
    model = nn.ModuleDict({"q": getattr(theirs, name)(**options)})
    (report,) = fastvq.replace_modules(model)
    assert not report.replaced
    assert f"construct fastvq.{name}" in str(report)
    own = getattr(fastvq, name)(**options)
    own.load_state_dict(model["q"].state_dict())


def test_tensors_stay_the_same() -> None:
    host = nn.ModuleDict({"q": theirs.VectorQuantize(DIM, CODES, codebook_dim=4)}).eval()
    before: dict[str, Tensor] = dict(host.named_parameters()) | dict(host.named_buffers())
    fastvq.replace_modules(host)
    after = dict(host.named_parameters()) | dict(host.named_buffers())
    for key in host.state_dict():
        assert after[key] is before[key]
    assert not host["q"].training


def test_codes_of_a_half_precision_host_become_float32() -> None:
    host = nn.ModuleDict({"q": theirs.VectorQuantize(DIM, CODES)}).half()
    codes = host["q"].codebook.clone()
    (report,) = fastvq.replace_modules(host)
    assert report.replaced, str(report)
    assert host["q"].codebook.dtype == torch.float32
    assert torch.equal(host["q"].codebook, codes.float())


def test_a_start_by_k_means_still_to_come() -> None:
    torch.manual_seed(0)
    host, ours = swapped(theirs.VectorQuantize(DIM, 4, kmeans_init=True))
    ours["q"](torch.randn(VECTORS))
    assert bool(ours["q"]._codebook.initted)
    assert ours["q"].codebook.abs().sum() > 0
    assert not bool(host["q"]._codebook.initted)


def test_what_is_out_of_scope_is_left_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "affine": theirs.VectorQuantize(DIM, CODES, affine_param=True),
            "in_place": theirs.VectorQuantize(
                DIM,
                CODES,
                learnable_codebook=True,
                ema_update=False,
                in_place_codebook_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            ),
        }
    )
    affine, in_place = fastvq.replace_modules(model)
    assert not affine.replaced
    assert "affine_param=True" in str(affine)
    assert not in_place.replaced
    assert "in_place_codebook_optimizer" in str(in_place)
