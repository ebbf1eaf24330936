"""PixelCNN: what each prediction sees, its probabilities, its refusals; sampling is elsewhere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvq.models.pixelcnn import PixelCNN

H, W = 5, 7

OPTIONS: dict[str, dict[str, Any]] = {
    "depth 1": {"num_layers": 1},
    "depth 2": {"num_layers": 2},
    "depth 3": {"num_layers": 3},
    "depth 7": {"num_layers": 7},
    "depth 12": {"num_layers": 12},
    "kernel 5": {"num_layers": 3, "kernel_size": 5},
    "kernel 7": {"num_layers": 2, "kernel_size": 7},
    "first kernel 7": {"num_layers": 2, "first_kernel_size": 7},
    "dilations": {"num_layers": 4, "dilations": (1, 2)},
    "dilation 2 only": {"num_layers": 3, "dilations": (2,)},
    "kernel 5 dilated": {"num_layers": 4, "kernel_size": 5, "dilations": (1, 2, 1)},
    "classes": {"num_layers": 3, "num_classes": 4},
    "condition": {"num_layers": 3, "condition_channels": 3},
    "attention": {"num_layers": 2, "attention_every": 2, "attention_heads": 4},
    "attention first": {"num_layers": 3, "attention_every": 1, "attention_heads": 2},
    "dropout": {"num_layers": 3, "dropout": 0.5},
    "everything": {
        "num_layers": 4,
        "kernel_size": 5,
        "num_classes": 4,
        "condition_channels": 3,
        "dilations": (1, 2),
        "attention_every": 3,
        "attention_heads": 2,
        "dropout": 0.3,
    },
}


def _build(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(6, 16, **options).to(dtype).eval()


def _inputs(options: dict[str, Any], batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {}
    if options.get("num_classes"):
        inputs["class_labels"] = torch.arange(batch) % options["num_classes"]
    if options.get("condition_channels"):
        inputs["condition"] = torch.randn(1, options["condition_channels"], H, W, dtype=dtype)
        inputs["condition"] = inputs["condition"].expand(batch, -1, -1, -1)
    return inputs


def _shifted(seen: Tensor, down: int, right: int) -> Tensor:
    """(H, W, …) with entry (i, j) taken from (i − down, j − right); nothing from outside."""
    out = torch.zeros_like(seen)
    for i, j in itertools.product(range(H), range(W)):
        if 0 <= i - down < H and 0 <= j - right < W:
            out[i, j] = seen[i - down, j - right]
    return out


def _expected_reach(options: dict[str, Any]) -> Tensor:
    """(H·W, H·W) bool: which codes each prediction sees, by following the stacks' rule."""
    own = torch.eye(H * W, dtype=torch.bool).view(H, W, H * W)
    vertical, horizontal = own, own
    kernel, dilations = options.get("kernel_size", 3), options.get("dilations", (1,))
    every = options.get("attention_every", 0)
    for layer in range(options["num_layers"]):
        first = layer == 0
        r = ((options.get("first_kernel_size") or kernel) if first else kernel) // 2
        d = 1 if first else dilations[layer % len(dilations)]
        new_vertical, new_horizontal = torch.zeros_like(own), torch.zeros_like(own)
        for up, side in itertools.product(range(1 if first else 0, r + 1), range(-r, r + 1)):
            new_vertical |= _shifted(vertical, up * d, side * d)
        for left in range(1 if first else 0, r + 1):
            new_horizontal |= _shifted(horizontal, 0, left * d)
        vertical, horizontal = new_vertical, new_horizontal | new_vertical
        if every and (layer + 1) % every == 0:
            flat = horizontal.flatten(0, 1)
            for p in range(1, H * W):
                flat[p] |= flat[p - 1]
    return horizontal.flatten(0, 1)


def _reach_by_gradient(model: PixelCNN, options: dict[str, Any]) -> Tensor:
    """(H·W, H·W) bool: where d logits[p] / d embedding[p'] is not exactly zero."""
    count = H * W
    embedded = torch.randn(1, 16, H, W, dtype=torch.float64).repeat(count, 1, 1, 1)
    embedded.requires_grad_()
    inputs = _inputs(options, 1, torch.float64)
    inputs = {name: value.expand(count, *value.shape[1:]) for name, value in inputs.items()}
    logits = model.logits_from_embedding(embedded, **inputs).flatten(2)
    weights = torch.randn(logits.shape[1], dtype=torch.float64)
    # copy p of the batch contributes its logits at p
    torch.einsum("pkp,k->", logits, weights).backward()
    return (embedded.grad != 0).any(dim=1).flatten(1)


@pytest.mark.parametrize("name", OPTIONS)
def test_sees_exactly_the_earlier_codes_within_reach(name: str) -> None:
    options = OPTIONS[name]
    expected = _expected_reach(options)
    assert not expected.triu().any()
    assert torch.equal(_reach_by_gradient(_build(options), options), expected)


@pytest.mark.parametrize("name", ["depth 12", "everything"])
def test_with_enough_layers_every_earlier_code_is_seen(name: str) -> None:
    every_earlier = torch.ones(H * W, H * W, dtype=torch.bool).tril(-1)
    options = OPTIONS[name]
    assert torch.equal(_reach_by_gradient(_build(options), options), every_earlier)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "attention" not in name])
def test_nan_in_later_codes_changes_nothing(name: str) -> None:
    options = dict(OPTIONS[name], attention_every=0)
    model = _build(options, torch.float32)
    inputs = _inputs(options, 1, torch.float32)
    embedded = torch.randn(1, 16, H, W)
    with torch.no_grad():
        clean = model.logits_from_embedding(embedded, **inputs).flatten(2)
        for p in (0, W - 1, W, 2 * W + 3, H * W - 1):
            poisoned = embedded.clone()
            poisoned.flatten(2)[:, :, p:] = torch.nan
            got = model.logits_from_embedding(poisoned, **inputs).flatten(2)
            assert torch.equal(got[:, :, : p + 1], clean[:, :, : p + 1])


@pytest.mark.parametrize("name", ["attention", "everything"])
def test_huge_later_codes_change_nothing_under_attention(name: str) -> None:
    options = OPTIONS[name]
    model = _build(options)
    inputs = _inputs(options, 1, torch.float64)
    embedded = torch.randn(1, 16, H, W, dtype=torch.float64)
    with torch.no_grad():
        clean = model.logits_from_embedding(embedded, **inputs).flatten(2)
        for p in (0, W - 1, W, 2 * W + 3):
            poisoned = embedded.clone()
            poisoned.flatten(2)[:, :, p:] = 1e30
            got = model.logits_from_embedding(poisoned, **inputs).flatten(2)
            assert torch.equal(got[:, :, : p + 1], clean[:, :, : p + 1])


def test_receptive_field_bounds_the_reach() -> None:
    for name, options in OPTIONS.items():
        field = _build(options).receptive_field
        if "attention_every" in options:
            assert field == (None, None), name
            continue
        p, seen = _expected_reach(options).nonzero().unbind(1)
        rows, columns = int((p // W - seen // W).max()), int((p % W - seen % W).abs().max())
        assert rows <= field.rows, name
        assert columns <= field.columns, name
        if "dilations" not in options:  # the box is met exactly, as far as the map goes
            assert rows == min(field.rows, H - 1), name
            assert columns == min(field.columns, W - 1), name


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (3, 8)])
def test_any_size(size: tuple[int, int]) -> None:
    model = PixelCNN(5, 8, 4, 5, dilations=(1, 3), attention_every=2, attention_heads=2)
    assert model(torch.randint(0, 5, (2, *size))).shape == (2, 5, *size)


def test_labels_and_map_reach_every_position() -> None:
    options = {"num_layers": 2, "num_classes": 4, "condition_channels": 3}
    model = _build(options)
    codes = torch.randint(0, 6, (1, H, W))
    condition = torch.randn(1, 3, H, W, dtype=torch.float64)
    with torch.no_grad():
        base = model(codes, torch.tensor([0]), condition)
        assert (model(codes, torch.tensor([1]), condition) != base).any(dim=1).all()
        assert (model(codes, torch.tensor([0]), condition + 1) != base).any(dim=1).all()


@pytest.mark.parametrize("told", [False, True])
def test_probabilities_of_all_maps_sum_to_one(told: bool) -> None:
    torch.manual_seed(0)
    more = {"num_classes": 2, "condition_channels": 3} if told else {}
    model = PixelCNN(2, 8, 3, attention_every=3, attention_heads=2, **more).double()
    maps = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 2, 2)
    inputs = {}
    if told:
        inputs["class_labels"] = torch.ones(16, dtype=torch.int64)
        inputs["condition"] = torch.randn(1, 3, 2, 2).double().expand(16, -1, -1, -1)
    log_prob = model.log_prob(maps, **inputs)
    assert log_prob.shape == (16,)
    # sixteen float64 terms, each a product of four softmax values: well below 1e-12
    torch.testing.assert_close(log_prob.exp().sum().item(), 1.0, rtol=0, atol=1e-12)


def test_code_log_prob_is_the_log_softmax_at_the_code() -> None:
    model = _build({"num_layers": 2})
    codes = torch.randint(0, 6, (2, H, W))
    each = model.code_log_prob(codes)
    for b, i, j in ((0, 0, 0), (1, 2, 3), (1, H - 1, W - 1)):
        expected = model(codes)[b, :, i, j].log_softmax(0)[codes[b, i, j]]
        torch.testing.assert_close(each[b, i, j], expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(model.log_prob(codes), each.sum((1, 2)))


def test_bfloat16_autocast_and_gradients() -> None:
    model = PixelCNN(6, 16, 3, num_classes=2, attention_every=2, attention_heads=2)
    codes, labels = torch.randint(0, 6, (2, H, W)), torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(codes, labels).dtype == torch.bfloat16
        log_prob = model.log_prob(codes, labels)
    assert log_prob.dtype == torch.float32
    (-log_prob.mean()).backward()
    # The last layer's vertical output is unused, but its features are linked: all weights learn.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_to_one_graph() -> None:
    options = OPTIONS["everything"]
    model = _build(options)
    codes, inputs = torch.randint(0, 6, (2, H, W)), _inputs(options, 2, torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # same operations, possibly reordered, in float64 on logits near 1
    torch.testing.assert_close(
        compiled(codes, **inputs), model(codes, **inputs), rtol=0, atol=1e-12
    )


def test_saves_and_loads(tmp_path: Path) -> None:
    options = OPTIONS["everything"]
    model = _build(options, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PixelCNN.from_pretrained(tmp_path)
    codes, inputs = torch.randint(0, 6, (2, H, W)), _inputs(options, 2, torch.float32)
    assert torch.equal(loaded(codes, **inputs), model(codes, **inputs))


def test_refuses_wrong_codes() -> None:
    model = PixelCNN(4, 8, 2)
    with pytest.raises(TypeError, match=r"codes must be int64; got torch\.int32"):
        model(torch.zeros(1, 2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"codes must be \(B, H, W\).*got \(2, 2\)"):
        model(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got -1, which a quantizer gives a row that holds NaN"):
        model(torch.full((1, 2, 2), -1))
    with pytest.raises(ValueError, match="codes must be in 0 … 3; got values from 4 to 4"):
        model(torch.full((1, 2, 2), 4))


def test_refuses_wrong_labels_and_maps() -> None:
    codes = torch.zeros(2, 3, 3, dtype=torch.int64)
    plain, classes = PixelCNN(4, 8, 2), PixelCNN(4, 8, 2, num_classes=3)
    mapped = PixelCNN(4, 8, 2, condition_channels=5)
    with pytest.raises(ValueError, match="class_labels must be None"):
        plain(codes, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="class_labels must be given"):
        classes(codes)
    with pytest.raises(ValueError, match=r"class_labels must be \(2,\).*got \(3,\)"):
        classes(codes, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"class_labels must be in 0 … 2; got values from 0 to 3"):
        classes(codes, torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"class_labels must be int64"):
        classes(codes, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="condition must be given exactly when"):
        plain(codes, condition=torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match="condition must be given exactly when"):
        mapped(codes)
    with pytest.raises(ValueError, match=r"condition must be \(2, 5, 3, 3\).*got \(2, 5, 3, 4\)"):
        mapped(codes, condition=torch.zeros(2, 5, 3, 4))


def test_refuses_wrong_arguments() -> None:
    for name in ("num_codes", "num_layers", "hidden_channels", "num_classes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            PixelCNN(**{"num_codes": 4, name: 0})
    with pytest.raises(ValueError, match=r"len\(dilations\) must be at least 1; got 0"):
        PixelCNN(4, dilations=())
    with pytest.raises(ValueError, match="multiple of heads"):
        PixelCNN(4, 12, attention_every=1)
