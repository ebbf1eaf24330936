"""gated_masked_conv: values and gradients, what it saves, dropout, layouts, compiling."""

from __future__ import annotations

import pytest
import torch
from ops.gated_cases import CASES, Case, arguments, error_bounds, results, upstream
from tolerances import assert_within
from torch import Tensor

from fastvq import ops
from fastvq.ops import GatedWeights
from fastvq.reference import gated_masked_conv as reference

RAW = torch.ops.fastvq
PLAIN = Case(4, 3, "B", 1, (4, 5), condition=2)
DROPS = Case(4, 3, "B", 1, (4, 5), dropout=0.4, condition=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"C{case.channels}k{case.kernel}")
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    truth = results(case, {name: tensor.double() for name, tensor in tensors.items()}, truth=True)
    bounds = error_bounds(case, tensors, upstream(case, torch.float64), dtype)
    for name, found in results(case, tensors).items():
        assert found.dtype == dtype
        assert_within(found, truth[name], bounds[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"C{case.channels}k{case.kernel}")
def test_plain_tensor_arithmetic_is_the_reference(case: Case) -> None:
    """What runs without kernels, in float64, where only the order of sums differs."""
    tensors = case.tensors(torch.float64)
    truth = results(case, tensors, truth=True)
    for name, found in results(case, tensors).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [CASES[0], Case(2, 5, "B", 2, (2, 3), dropout=0.5, condition=1)])
def test_gradcheck(case: Case) -> None:
    tensors = {
        name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float64).items()
    }

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        first, by_name = arguments(dict(zip(tensors, values)))
        return ops.gated_masked_conv(*first, **by_name, **case.options, seed=case.seed)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


def test_masked_weights_may_hold_anything() -> None:
    for mask_type, live in (("A", 2), ("B", 3)):
        case = Case(4, 5, mask_type, 1, (3, 4))
        tensors = case.tensors()
        clean = results(case, tensors)
        tensors["horizontal_weight"][..., live:] = torch.nan
        for name, found in results(case, tensors).items():
            assert torch.equal(found, clean[name])
        assert not clean["horizontal_weight"][..., live:].any()
        assert clean["horizontal_weight"][..., :live].all()


@pytest.mark.parametrize(
    "case", [Case(4, 3, "B", 1, (5, 6)), Case(16, 5, "B", 1, (13, 12), batch=7)]
)
def test_nan_stays_where_it_is_seen(case: Case) -> None:
    tensors = case.tensors()
    clean = results(case, tensors)
    tensors["vertical"][:, :, 3] = torch.nan
    tensors["horizontal"][:, :, 2, 4:] = torch.nan
    found = results(case, tensors)
    assert torch.equal(found["out_vertical"][:, :, :3], clean["out_vertical"][:, :, :3])
    last = 3 + case.kernel // 2
    assert found["out_vertical"][:, :, 3 : last + 1].isnan().all()
    assert torch.equal(
        found["out_vertical"][:, :, last + 1 :], clean["out_vertical"][:, :, last + 1 :]
    )
    assert torch.equal(found["out_horizontal"][:, :, 2, :4], clean["out_horizontal"][:, :, 2, :4])
    assert found["out_horizontal"][:, :, 2, 4:].isnan().all()


def test_dropout_follows_its_seed() -> None:
    shape = torch.Size((3, 5, 40, 41))
    masks = {
        (seed, stack): reference.keep_mask(torch.tensor(seed), stack, shape, 0.3)
        for seed in (0, 1, -5)
        for stack in (0, 1)
    }
    count = shape.numel()
    for key, mask in masks.items():
        # Binomial: five standard deviations.
        assert abs(mask.double().mean() - 0.7) < 5 * (0.21 / count) ** 0.5
        for other, its_mask in masks.items():
            if other != key:
                agree = (mask == its_mask).double().mean()
                assert abs(agree - 0.58) < 5 * (0.2436 / count) ** 0.5
    everything = reference.keep_mask(torch.tensor(0), 0, shape, 1.0)
    assert not everything.any()
    dropped = results(DROPS, DROPS.tensors())["out_vertical"] == 0
    kept = reference.keep_mask(DROPS.seed, 0, dropped.shape, 0.4)
    assert torch.equal(dropped, ~kept)


def test_saves_at_most_half_of_eager() -> None:
    from benchmarks.nn.gated_layer import padded_crop
    from fastvq.nn import GatedMaskedConv2d

    layer = GatedMaskedConv2d(16, 3)
    x = torch.randn(2, 2, 16, 12, 12, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = []
    for run in (layer, padded_crop(layer)):
        bytes_of: dict[int, int] = {}
        kept = []

        def keep(tensor: Tensor, bytes_of: dict[int, int] = bytes_of, kept: list = kept) -> Tensor:
            kept.append(tensor)  # or its address could be given out again
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                bytes_of[storage.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(x[0].clone(), x[1].clone())
        saved.append(sum(bytes_of.values()))
    ours, eager = saved
    assert ours == 4 * x[0].numel() * 4  # both inputs and the vertical features
    assert 2 * ours <= eager


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck(backend: str) -> None:
    for case, last in ((DROPS, True), (CASES[4], False)):
        tensors = case.tensors()
        if last:
            for name in ("vertical", "horizontal"):
                tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        (vertical, horizontal, weights), by_name = arguments(tensors)
        given = [by_name.get(name) for name in ("class_bias", "condition", "condition_weight")]
        raw = (
            *(case.seed, case.dropout, case.mask_type, case.dilation, True, backend),
            *(vertical, horizontal, *given, list(weights)),
        )
        torch.library.opcheck(RAW.gated_masked_conv.default, raw)
        *outputs, features = RAW.gated_masked_conv.default(*raw)
        for wanted in ([True] * 3, [False] * 3):
            torch.library.opcheck(
                RAW.gated_masked_conv_backward.default, (*outputs, features, wanted, *raw)
            )


def test_layouts_and_empty_batch() -> None:
    tensors = PLAIN.tensors()
    expected = results(PLAIN, tensors)
    last = dict(tensors)
    for name in ("vertical", "horizontal", "condition"):
        last[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    found = results(PLAIN, last)
    for name, value in expected.items():
        assert value.is_contiguous()
        assert torch.equal(found[name], value)
    for name in ("out_vertical", "out_horizontal", "vertical", "horizontal"):
        assert found[name].is_contiguous(memory_format=torch.channels_last)
    strided = dict(tensors)
    strided["vertical"] = tensors["vertical"].transpose(2, 3).contiguous().transpose(2, 3)
    for name, value in results(PLAIN, strided).items():
        assert torch.equal(value, expected[name])
    empty = Case(4, 3, "B", 1, (4, 5), batch=0)
    for name, value in results(empty, empty.tensors()).items():
        assert value.shape[0] == 0 or not value.any(), name


def test_same_bits_on_every_run_and_thread_count() -> None:
    case = Case(24, 3, "B", 1, (33, 16), dropout=0.2)
    tensors = case.tensors()
    first = results(case, tensors)
    threads = torch.get_num_threads()
    for count in (threads, 1):
        torch.set_num_threads(count)
        again = results(case, tensors)
        torch.set_num_threads(threads)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_autocast_casts_as_conv2d_does() -> None:
    tensors = PLAIN.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(PLAIN, tensors)
    assert found["out_vertical"].dtype == torch.bfloat16
    assert found["out_horizontal"].dtype == torch.float32  # the residual keeps its own
    assert all(found[name].dtype == torch.float32 for name in tensors)
    low = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    truth = results(PLAIN, {name: tensor.double() for name, tensor in low.items()}, truth=True)
    bounds = error_bounds(PLAIN, low, upstream(PLAIN, torch.float64), torch.bfloat16)
    # The residual adds the unrounded input.
    truth["out_horizontal"] += tensors["horizontal"].double() - low["horizontal"].double()
    for name, value in found.items():
        assert_within(value, truth[name], bounds[name])


def test_compiles() -> None:
    compiled = torch.compile(ops.gated_masked_conv, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, ops.gated_masked_conv):
        leaves = {name: t.requires_grad_() for name, t in DROPS.tensors().items()}
        first, by_name = arguments(leaves)
        outputs = run(*first, **by_name, **DROPS.options, seed=DROPS.seed)
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream(DROPS, torch.float32))
        found.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_backends_are_named() -> None:
    x = PLAIN.tensors()["vertical"]
    assert ops.explain("gated_masked_conv", x).startswith("gated_masked_conv: cpp")
    assert "Winograd" in ops.explain("gated_masked_conv", x)
    assert "Winograd" not in ops.explain("gated_masked_conv", x.bfloat16())
    assert "not float64" in ops.explain("gated_masked_conv", x.double())
    by_name = results(PLAIN, PLAIN.tensors(), backend="cpp")
    assert torch.equal(results(PLAIN, PLAIN.tensors())["vertical"], by_name["vertical"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"vertical": torch.ones(2, 4, 4)}, ValueError, r"vertical must be \(B, C, H, W\)"),
        ({"horizontal": torch.ones(2, 4, 4, 4)}, ValueError, r"horizontal must be \(2, 4, 4, 5\)"),
        ({"vertical_weight": torch.ones(8, 4, 1, 3)}, ValueError, r"must be \(8, 4, 2, 3\)"),
        ({"class_bias": torch.ones(2, 8)}, ValueError, r"class_bias must be \(2, 16\)"),
        ({"link_bias": torch.ones(8).half()}, TypeError, "link_bias must have the dtype"),
        ({"mask_type": "C"}, ValueError, 'mask_type must be "A" or "B"'),
        ({"dilation": 0}, ValueError, "dilation must be at least 1; got 0"),
        ({"condition_weight": None}, ValueError, "must be given together"),
        ({"seed": torch.tensor(1), "dropout": 1.5}, ValueError, "dropout must be in 0 … 1"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], words: str) -> None:
    everything = {**PLAIN.tensors(), **PLAIN.options, **change}
    weights = GatedWeights(*(everything.pop(name) for name in GatedWeights._fields))
    with pytest.raises(error, match=words):
        ops.gated_masked_conv(
            everything.pop("vertical"), everything.pop("horizontal"), weights, **everything
        )
