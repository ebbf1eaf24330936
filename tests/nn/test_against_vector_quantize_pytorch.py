"""VectorQuantize against the package it replaces: same weights, inputs and seeds.

Outputs, indices, losses, gradients, and the state after several steps, over the options both have;
state dicts load in both directions. Where that package is defective (rows that are NaN, batches
without rows, half-precision state, masks with heads or cosine codes) tests elsewhere hold ours to
the promise instead.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvq

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the package to compare with is in the test extra"
)

U = 2.0**-24
DIM, CODES, STEPS = 8, 16, 3
# Sums have at most this many terms: rows of a batch, codes, or channels.
TERMS = 64

LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sequence": ({}, (3, 12, DIM)),
    "vectors": ({}, (20, DIM)),
    "channel_first": ({"channel_last": False}, (3, DIM, 12)),
    "picture": ({"accept_image_fmap": True}, (2, DIM, 4, 5)),
    "video": ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 3)),
    "projected": ({"codebook_dim": 5}, (3, 12, DIM)),
    "layernorm": ({"codebook_dim": 5, "layernorm_after_project_in": True}, (3, 12, DIM)),
    "heads": ({"heads": 2, "codebook_dim": 4}, (3, 12, DIM)),
    "separate_heads": (
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
        (3, 12, DIM),
    ),
    "picture_heads": ({"heads": 2, "codebook_dim": 4, "accept_image_fmap": True}, (2, DIM, 4, 3)),
    # In one channel a rotation onto an opposite code is 0/0, decided by rounding.
    "one_channel": ({"codebook_dim": 1, "rotation_trick": False}, (3, 12, DIM)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "straight_through_estimator": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "decay_and_eps": {"decay": 0.95, "eps": 1e-2, "commitment_weight": 0.25},
    "no_commitment": {"commitment_weight": 0.0},
    "frozen": {"freeze_codebook": True},
    "no_ema": {"ema_update": False},
    "manual": {"manual_ema_update": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable_only": {
        "learnable_codebook": True,
        "ema_update": False,
        "route_gradients_to_input": False,
    },
    "unrouted": {"route_gradients_to_input": False},
}


def _pair(options: dict[str, Any], dim: int = DIM) -> tuple[nn.Module, nn.Module]:
    """Both modules, with the same weights."""
    torch.manual_seed(0)
    theirs = peer.VectorQuantize(dim, CODES, **options)
    torch.manual_seed(0)
    ours = fastvq.VectorQuantize(dim, CODES, **options)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        assert name == other  # the same names in the same order, and the same random numbers
        assert torch.equal(a, b), name
    # Codes as far apart as the rows: every code is used, and no two are close.
    codes = torch.randn(theirs._codebook.embed.shape, generator=_generator(99))
    if options.get("use_cosine_sim"):
        codes = nn.functional.normalize(codes, dim=-1)
    with torch.no_grad():
        theirs._codebook.embed.copy_(codes)
    theirs._codebook.embed_avg.copy_(codes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bound(steps: int, magnitude: float) -> float:
    """Each side errs by TERMS·u·Σ|terms| in a sum, and by as much in what is derived from it.

    A step is a chain of at most four such sums (projection, statistics, rotation, loss), on each
    of two sides.
    """
    return steps * 2 * 4 * TERMS * U * magnitude


def _assert_close(a: Tensor, b: Tensor, bound: float, what: str) -> None:
    assert a.shape == b.shape, what
    assert a.dtype == b.dtype, what
    worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert worst <= bound, f"{what}: {worst:.3g} > {bound:.3g}"


def _compare_step(
    ours: nn.Module,
    theirs: nn.Module,
    x: Tensor,
    step: int,
    forward: dict[str, Any] | None = None,
    seed: int = 0,
    amplify: float = 1.0,
) -> None:
    """One training step of both; everything they give is compared."""
    results = []
    for module in (ours, theirs):
        torch.manual_seed(seed)
        module.zero_grad(set_to_none=True)
        inputs = x.clone().requires_grad_()
        quantize, indices, loss, terms = module(
            inputs, return_loss_breakdown=True, **(forward or {})
        )
        weight = torch.randn(quantize.shape, generator=_generator(7))
        ((quantize * weight).sum() + loss.sum()).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((quantize, indices, loss, terms, inputs.grad, grads))
    (q1, i1, l1, t1, g1, p1), (q2, i2, l2, t2, g2, p2) = results
    bound = amplify * _bound(step + 1, 4.0 * DIM)
    assert torch.equal(i1, i2)
    assert i1.dtype == i2.dtype == torch.int64
    _assert_close(q1, q2, bound, "quantize")
    _assert_close(l1, l2, bound, "loss")
    for name, a, b in zip(t1._fields, t1, t2, strict=True):
        # Theirs gives the losses of topk flat here, though not in `loss`.
        _assert_close(a, b.reshape(a.shape), bound, name)
    _assert_same_gradient(g1, g2, bound, "x")
    assert p1.keys() == p2.keys()
    for name in p1:
        # The gradient of a parameter is a sum over rows of size about 4 each.
        _assert_same_gradient(p1[name], p2[name], 16 * bound, name)
    _assert_same_state(ours, theirs, bound)


def _assert_same_gradient(a: Tensor | None, b: Tensor | None, bound: float, what: str) -> None:
    """No gradient and a gradient of zeros are the same."""
    if a is None or b is None:
        given = b if a is None else a
        assert given is None or not given.any(), what
    else:
        _assert_close(a, b, bound, f"gradient of {what}")


def _assert_same_state(ours: nn.Module, theirs: nn.Module, bound: float) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    # A code is a quotient by a smoothed count of at least 0.8³.
    for key in mine:
        _assert_close(mine[key], other[key], bound / 0.8**3, key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_training_steps(option: str, layout: str) -> None:
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair({**arguments, **OPTIONS[option]})
    for step in range(STEPS):
        x = torch.randn(shape, generator=_generator(step))
        _compare_step(ours, theirs, x, step)
    _compare_evaluation(ours, theirs, torch.randn(shape, generator=_generator(50)), arguments)
    if option == "manual":
        ours._codebook.update_ema()
        theirs._codebook.update_ema()
        _assert_same_state(ours, theirs, _bound(STEPS + 1, 4.0 * DIM))


def test_a_single_channel_is_never_rotated() -> None:
    ours, theirs = _pair({}, dim=1)
    assert ours.rotation_trick is theirs.rotation_trick is False
    _compare_step(ours, theirs, torch.randn(3, 12, 1, generator=_generator(0)), 0)


def _compare_evaluation(
    ours: nn.Module, theirs: nn.Module, x: Tensor, arguments: dict[str, Any]
) -> None:
    theirs.load_state_dict(ours.state_dict())
    ours.eval()
    theirs.eval()
    (q1, i1, l1), (q2, i2, l2) = ours(x), theirs(x)
    assert torch.equal(i1, i2)
    assert l1.item() == l2.item() == 0.0
    # The same codes, and one product more where there is a projection.
    _assert_close(q1, q2, _bound(1, 4.0) if ours.has_projections else 0.0, "quantize")
    shared_heads = arguments.get("heads", 1) > 1 and not ours.separate_codebook_per_head
    codes = ours.get_codes_from_indices(i1)
    # Theirs leaves heads of one codebook, and separate ones of a single vector, to the caller.
    if not (shared_heads and arguments.get("accept_image_fmap")):
        assert torch.equal(codes, theirs.get_codes_from_indices(i2))
    if not shared_heads and "accept_image_fmap" not in arguments:
        _assert_close(
            ours.get_output_from_indices(i1),
            theirs.get_output_from_indices(i2),
            _bound(1, 4.0),
            "get_output_from_indices",
        )


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("option", ["default", "straight_through_estimator", "learnable"])
@pytest.mark.parametrize("by", ["mask", "lens"])
def test_masks(by: str, option: str, zeros: bool) -> None:
    ours, theirs = _pair({**OPTIONS[option], "return_zeros_for_masked_padding": zeros})
    for step in range(STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        lens = torch.tensor([12, 5 + step, 1])
        mask = torch.arange(12) < lens[:, None]
        _compare_step(ours, theirs, x, step, {by: mask if by == "mask" else lens})


@pytest.mark.parametrize("temperature", [None, 0.0, 0.3])
@pytest.mark.parametrize("layout", ["sequence", "vectors", "picture", "separate_heads"])
@pytest.mark.parametrize("cosine", [False, True])
def test_drawn_codes(cosine: bool, layout: str, temperature: float | None) -> None:
    """The same seed draws the same codes."""
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair(
        {
            **arguments,
            "stochastic_sample_codes": True,
            "sample_codebook_temp": 0.7,
            "rotation_trick": False,
            "use_cosine_sim": cosine,
        }
    )
    for step in range(STEPS):
        x = torch.randn(shape, generator=_generator(step))
        _compare_step(ours, theirs, x, step, {"sample_codebook_temp": temperature}, seed=step)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("layout", ["sequence", "projected", "separate_heads"])
def test_gumbel_straight_through(layout: str, routed: bool, stochastic: bool) -> None:
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair(
        {
            **arguments,
            "straight_through": True,
            "rotation_trick": False,
            "route_gradients_to_input": routed,
            "stochastic_sample_codes": stochastic,
            # Theirs takes its gradient with the codes that the step has already moved.
            "freeze_codebook": True,
        }
    )
    for step in range(STEPS):
        x = torch.randn(shape, generator=_generator(step))
        # Gradients through distances of at least 0.1: each error counts up to 1/(2·0.1) fold.
        _compare_step(ours, theirs, x, step, seed=step, amplify=5.0)


@pytest.mark.parametrize("layout", ["sequence", "vectors", "picture", "heads", "separate_heads"])
def test_diversity_loss(layout: str) -> None:
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair(
        {
            **arguments,
            "codebook_diversity_loss_weight": 0.3,
            "codebook_diversity_temperature": 5.0,
            "freeze_codebook": True,
        }
    )
    for step in range(STEPS):
        x = torch.randn(shape, generator=_generator(step))
        # Distances of at least 0.1 times the temperature 5.
        _compare_step(ours, theirs, x, step, amplify=5.0 * 5.0)


@pytest.mark.parametrize("layout", ["sequence", "projected", "heads", "separate_heads"])
@pytest.mark.parametrize("cosine", [False, True])
def test_cross_entropy_commitment(cosine: bool, layout: str) -> None:
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair(
        {
            **arguments,
            "commitment_use_cross_entropy_loss": True,
            "use_cosine_sim": cosine,
            "freeze_codebook": True,
        }
    )
    for step in range(STEPS):
        x = torch.randn(shape, generator=_generator(step))
        _compare_step(ours, theirs, x, step, amplify=5.0)


@pytest.mark.parametrize("heads", [{}, {"heads": 2, "separate_codebook_per_head": True}])
@pytest.mark.parametrize("max_codes", [None, 6])
def test_orthogonal_loss(max_codes: int | None, heads: dict[str, Any]) -> None:
    ours, theirs = _pair(
        {"orthogonal_reg_weight": 2.0, "orthogonal_reg_max_codes": max_codes, **heads}
    )
    assert isinstance(ours._codebook.embed, nn.Parameter)
    for step in range(STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        _compare_step(ours, theirs, x, step, seed=step)


def test_orthogonal_loss_of_active_codes() -> None:
    ours, theirs = _pair({"orthogonal_reg_weight": 2.0, "orthogonal_reg_active_codes_only": True})
    for step in range(STEPS):
        _compare_step(ours, theirs, torch.randn(1, 9, DIM, generator=_generator(step)), step)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("layout", ["sequence", "vectors", "picture", "video", "channel_first"])
def test_topk(layout: str, learnable: bool) -> None:
    arguments, shape = LAYOUTS[layout]
    options = {"learnable_codebook": True, "ema_update": False} if learnable else {}
    ours, theirs = _pair({**arguments, **options})
    for step in range(STEPS):
        x = torch.randn(shape, generator=_generator(step))
        _compare_step(ours, theirs, x, step, {"topk": 3})
    ours.eval()
    theirs.eval()
    for a, b in zip(ours(x, topk=3), theirs(x, topk=3), strict=True):
        _assert_close(a, b, _bound(1, 4.0 * DIM), "topk")


def test_topk_with_a_mask() -> None:
    ours, theirs = _pair({})
    mask = torch.arange(12) < torch.tensor([[12], [5], [1]])
    x = torch.randn(3, 12, DIM, generator=_generator(0))
    _compare_step(ours, theirs, x, 0, {"topk": 4, "mask": mask})


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("layout", ["sequence", "separate_heads", "heads"])
def test_cross_entropy_of_given_indices(layout: str, cosine: bool) -> None:
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair({**arguments, "use_cosine_sim": cosine, "freeze_codebook": True})
    x = torch.randn(shape, generator=_generator(0))
    tail = (2,) if "heads" in arguments else ()
    given = torch.randint(-1, CODES, (*shape[:2], *tail), generator=_generator(1))
    grads = []
    for module in (ours, theirs):
        inputs = x.clone().requires_grad_()
        quantize, loss = module(inputs, indices=given)
        loss.backward()
        grads.append((quantize, loss, inputs.grad))
    # Distances of at least 0.1.
    _assert_close(grads[0][1], grads[1][1], 5 * _bound(1, 4.0 * DIM), "cross-entropy")
    _assert_close(grads[0][2], grads[1][2], 5 * _bound(1, 4.0 * DIM), "gradient of x")
    if layout == "sequence":  # theirs returns heads unjoined and unprojected
        _assert_close(grads[0][0], grads[1][0], _bound(1, 4.0 * DIM), "quantize")


@pytest.mark.parametrize("form", ["by_code", "by_head_and_code", "function"])
def test_weighted_updates(form: str) -> None:
    weight = torch.rand(CODES, generator=_generator(3))
    given = {
        "by_code": weight,
        "by_head_and_code": weight[None],
        "function": lambda sums, counts: (
            (counts > 2).float() * sums.abs().mean(dim=-1).clamp(max=1)
        ),
    }[form]
    ours, theirs = _pair({})
    for step in range(STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        _compare_step(ours, theirs, x, step, {"ema_update_weight": given})


def test_accumulated_updates() -> None:
    ours, theirs = _pair({})
    for step in range(2 * STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        _compare_step(ours, theirs, x, step, {"accum_ema_update": step % 3 != 2})


@pytest.mark.parametrize("update", [True, False, None])
def test_ema_update_by_call(update: bool | None) -> None:
    ours, theirs = _pair({})
    for step in range(STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        _compare_step(ours, theirs, x, step, {"ema_update": update})


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze_by_call(freeze: bool) -> None:
    ours, theirs = _pair({"freeze_codebook": not freeze})
    for step in range(STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        _compare_step(ours, theirs, x, step, {"freeze_codebook": freeze})


@pytest.mark.parametrize(
    "layout", ["sequence", "vectors", "channel_first", "picture", "projected", "separate_heads"]
)
def test_update_indices(layout: str) -> None:
    arguments, shape = LAYOUTS[layout]
    ours, theirs = _pair(arguments)
    x = torch.randn(shape, generator=_generator(0))
    indices = torch.randint(0, CODES, ours(x, freeze_codebook=True)[1].shape)
    for _ in range(STEPS):
        with torch.no_grad():
            theirs.update_indices(x, indices)
        ours.update_ema_indices(x, indices)
    _assert_same_state(ours, theirs, _bound(STEPS, 4.0 * DIM))


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_in_place_optimizer(optimizer: type, manual: bool) -> None:
    options = {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda parameters: optimizer(parameters, lr=0.1),
        "manual_in_place_optimizer_update": manual,
    }
    ours, theirs = _pair(options)
    for step in range(STEPS):
        x = torch.randn(3, 12, DIM, generator=_generator(step))
        found = []
        for module in (ours, theirs):
            quantize, indices, loss, terms = module(x, return_loss_breakdown=True)
            if manual:
                module.update_in_place_optimizer()
            found.append((quantize, loss, terms.inplace_optimize, indices))
        # Adam divides a gradient by its own size: an error of u in a gradient of 1/288 or more.
        bound = 300 * _bound(step + 1, 1.0)
        for a, b in zip(*found, strict=True):
            _assert_close(a, b, bound, "in-place step")
        _assert_same_state(ours, theirs, bound)


def test_implicit_codes() -> None:
    """Each vector's own codes, from a network over the shared ones."""
    options = {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False}
    ours, theirs = _pair(options)
    shift = torch.randn(3, 12, 1, DIM, generator=_generator(5))
    network = nn.Linear(DIM, DIM)
    networks = [network, copy.deepcopy(network)]
    x = torch.randn(3, 12, DIM, generator=_generator(0))
    found = []
    for module, own in zip((ours, theirs), networks, strict=True):
        inputs = x.clone().requires_grad_()
        quantize, indices, loss = module(
            inputs,
            codebook_transform_fn=lambda codes, own=own: own(codes)[:, None, None] + shift[None],
        )
        (quantize.sum() + loss).backward()
        found.append((indices, quantize, loss, inputs.grad, own.weight.grad))
    for a, b in zip(*found, strict=True):
        _assert_close(a, b, 16 * _bound(1, 4.0 * DIM), "implicit codes")


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_start_is_no_worse(cosine: bool) -> None:
    """The draws differ: what counts is the distance after the start."""
    x = torch.randn(1, 500, DIM, generator=_generator(0))
    if cosine:
        x = nn.functional.normalize(x, dim=-1)
    distances = []
    for package in (fastvq, peer):
        torch.manual_seed(0)
        module = package.VectorQuantize(
            DIM, CODES, kmeans_init=True, kmeans_iters=20, use_cosine_sim=cosine
        )
        assert not module._codebook.initted
        module(x, ema_update=False)
        assert module._codebook.initted
        quantize, _, _ = module.eval()(x)
        distances.append((quantize - x).square().mean().item())
        size = module._codebook.cluster_size
        assert size.sum().item() == pytest.approx(500.0, rel=TERMS * U)
        expected = module._codebook.embed * size[..., None]
        # Theirs smooths the codes by ε/N once more, and takes counts of an iteration earlier.
        if package is fastvq:
            _assert_close(module._codebook.embed_avg, expected, _bound(1, 500.0), "sums")
    assert distances[0] <= 1.05 * distances[1]


def test_expiry_restarts_what_theirs_would() -> None:
    """Codes below the threshold take rows of the batch, with the threshold as their count."""
    modules = _pair({"threshold_ema_dead_code": 1, "decay": 0.5})
    x = torch.randn(3, 12, DIM, generator=_generator(0))
    before = modules[0]._codebook.embed.clone()
    expired = []
    for module in modules:
        module(x)
        size = module._codebook.cluster_size[0]
        rows = (module._codebook.embed[0][:, None] == x.reshape(-1, DIM)).all(dim=2).any(dim=1)
        assert (size[rows] == 1.0).all()
        assert (size >= 1.0).all()
        expired.append(rows)
        assert torch.equal(module._codebook.embed_avg[0][rows], module._codebook.embed[0][rows])
    assert expired[0].any()
    assert torch.equal(*expired)
    assert not torch.equal(before, modules[0]._codebook.embed)
    ours = modules[0]
    with torch.no_grad():
        ours._codebook.cluster_size.zero_()
    ours.expire_codes_(x)
    assert (ours._codebook.cluster_size == 1.0).all()


def test_expiry_without_rows_for_all() -> None:
    modules = _pair({"threshold_ema_dead_code": 2})
    x = 100.0 + torch.randn(1, 3, DIM, generator=_generator(0))
    for module in modules:
        module(x)
        assert (module._codebook.cluster_size == 2.0).sum() == 3  # the other dead codes wait


def test_both_packages_name_the_same_arguments() -> None:
    import inspect

    for function in ("__init__", "forward"):
        mine = inspect.signature(getattr(fastvq.VectorQuantize, function)).parameters
        other = inspect.signature(getattr(peer.VectorQuantize, function)).parameters
        assert list(mine) == list(other)
        for name in mine:
            assert mine[name].default == other[name].default, name


def test_bound_is_meaningful() -> None:
    """The bound of a step is far below what any of the options changes."""
    assert _bound(STEPS, 4.0 * DIM) < 0.01
    assert math.isfinite(_bound(STEPS, 1.0))
