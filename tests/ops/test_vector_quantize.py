"""vector_quantize: values, and our backward against PyTorch's own through the reference."""

import itertools

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within, rounding_bound, sum_bound

from fastvq import ops

GRADIENTS = ["straight_through", "rotation"]


def _leaves(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


def _objective(output, weights):
    a, b, c = weights
    return (
        (output.quantized * a).sum() + (output.commitment * b).sum() + (output.codebook * c).sum()
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [None, "shared", "separate"])
def test_gradients_equal_native_autograd(heads, masked, metric, gradient):
    rows = (30, 5) if heads is None else (2, 15, 5)
    book = (2, 7, 5) if heads == "separate" else (7, 5)
    mask = torch.arange(rows[-2]) % 3 > 0 if masked else None
    weights = [w.detach().double() for w in _leaves(rows, rows[:-1], rows[:-1], seed=1)]
    results = []
    for backend in (None, "reference"):
        x, codebook = _leaves(rows, book, dtype=torch.float64)
        output = ops.vector_quantize(
            x, codebook, mask=mask, metric=metric, gradient=gradient, backend=backend
        )
        _objective(output, weights).backward()
        results.append((*output, x.grad, codebook.grad))
    for ours, native in zip(*results):
        # Both are float64: a few hundred roundings of numbers of order one.
        torch.testing.assert_close(ours, native, rtol=0, atol=1e3 * UNIT_ROUNDOFF[torch.float64])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_float32_gradients_against_float64(gradient):
    n, k, d = 200, 6, 20
    x, codebook = _leaves((n, d), (k, d))
    weights = [w.detach() for w in _leaves((n, d), (n,), (n,), seed=1)]
    output = ops.vector_quantize(x, codebook, gradient=gradient)
    _objective(output, weights).backward()
    x64, c64 = (t.detach().double().requires_grad_() for t in (x, codebook))
    truth = ops.vector_quantize(x64, c64, gradient=gradient, backend="reference")
    _objective(truth, [w.double() for w in weights]).backward()
    assert torch.equal(output.indices, truth.indices)
    # grad_codebook[k] sums 2·c·(q − x): three roundings a term, up to n terms.
    pull = 2 * weights[2][:, None] * (truth.quantized - x64).detach()
    size = torch.zeros(k, d, dtype=torch.float64)
    size.index_add_(0, truth.indices, pull.abs())
    assert_within(codebook.grad, c64.grad, sum_bound(n + 3, size))
    # grad_x: for the rotation three dot products of D terms, each with unit vectors of error
    # (D+4)·u, scaled by λ; the commitment adds three roundings.
    scale = (truth.quantized.norm(dim=1) / x64.norm(dim=1)).detach()[:, None].clamp(min=1)
    length = weights[0].double().norm(dim=1, keepdim=True)
    pulled = (2 * weights[1][:, None] * (x64 - truth.quantized)).detach().abs()
    bound = 8 * (d + 8) * UNIT_ROUNDOFF[torch.float32] * (5 * scale * length + pulled)
    assert_within(x.grad, x64.grad, bound)


HALVES = [torch.float16, torch.bfloat16]


def _kernel_and_truth(x, codebook, weights, **options):
    """Outputs and gradients of the C++ kernels, and of native autograd in float64."""
    results = []
    for backend, wide in (("cpp", False), ("reference", True)):
        rows, codes = (
            (t.detach().double() if wide else t.detach()).requires_grad_() for t in (x, codebook)
        )
        output = ops.vector_quantize(rows, codes, backend=backend, **options)
        _objective(
            output, [w.to(torch.float64 if wide else torch.float32) for w in weights]
        ).backward()
        results.append((output, rows.grad, codes.grad))
    return results


def _assert_gradients_close(ours, truth, x, codebook, weights):
    (_, grad_x, grad_codebook), (expected, true_x, true_codebook) = ours, truth
    d, n = x.shape[-1], x.shape[:-1].numel()
    found = (expected.indices >= 0)[..., None]
    rows = torch.where(found, x.detach().double(), 1.0)
    q = torch.where(found, expected.quantized.detach(), 1.0)
    # As in test_float32_gradients_against_float64; then rounded to the dtype of the input.
    scale = (q.norm(dim=-1) / rows.norm(dim=-1))[..., None].clamp(min=1)
    length = weights[0].double().norm(dim=-1, keepdim=True)
    pulled = (2 * weights[1].double()[..., None] * (rows - q)).abs()
    bound = 8 * (d + 8) * UNIT_ROUNDOFF[torch.float32] * (5 * scale * length + pulled)
    assert_within(grad_x, true_x, bound + rounding_bound(true_x, x.dtype))
    # No sum has more than n terms of at most the greatest size.
    largest = (2 * weights[2].double()[..., None] * (rows - q)).abs().max()
    bound = sum_bound(n + 3, torch.full_like(true_codebook, n * largest))
    assert_within(
        grad_codebook, true_codebook, bound + rounding_bound(true_codebook, codebook.dtype)
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(
    ("mask", "heads"),
    [
        *itertools.product((None, "rows"), (None, "shared", "separate")),
        *(("heads and rows", heads) for heads in ("shared", "separate")),
    ],
)
def test_kernel_gradients_against_native_autograd(mask, heads, metric, gradient):
    rows = (30, 20) if heads is None else (2, 15, 20)
    x, codebook = _leaves(rows, (2, 7, 20) if heads == "separate" else (7, 20))
    with torch.no_grad():
        x[..., 2, 3] = torch.nan
    weights = [w.detach() for w in _leaves(rows, rows[:-1], rows[:-1], seed=1)]
    weights[1][..., 2] = weights[2][..., 2] = 0.0  # a NaN loss has no useful gradient
    options = {"metric": metric, "gradient": gradient}
    if mask is not None:
        shape = torch.Size(rows[-2:-1] if mask == "rows" else rows[:-1])
        options["mask"] = torch.arange(shape.numel()).reshape(shape) % 3 > 0
    ours, truth = _kernel_and_truth(x, codebook, weights, **options)
    assert torch.equal(ours[0].indices, truth[0].indices)
    assert torch.equal(
        ours[0].quantized.nan_to_num(9.0), truth[0].quantized.float().nan_to_num(9.0)
    )
    for loss, true_loss in zip(ours[0][2:], truth[0][2:]):
        assert torch.equal(loss.isnan(), true_loss.isnan())
        assert_within(
            loss.nan_to_num(), true_loss.nan_to_num(), sum_bound(22, true_loss.nan_to_num())
        )
    _assert_gradients_close(ours, truth, x, codebook, weights)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_kernel_gradients_in_every_dtype(dtype, x_dtype, gradient):
    x, codebook = (
        t.detach().to(kind) for t, kind in zip(_leaves((40, 33), (6, 33)), (x_dtype, dtype))
    )
    # Upstream gradients that every dtype holds.
    weights = [
        w.detach().bfloat16().half().float() for w in _leaves((40, 33), (40,), (40,), seed=1)
    ]
    ours, truth = _kernel_and_truth(x, codebook, weights, gradient=gradient)
    assert torch.equal(ours[0].indices, truth[0].indices)
    assert torch.equal(ours[0].quantized, codebook[ours[0].indices])
    assert (ours[1].dtype, ours[2].dtype) == (x_dtype, dtype)
    _assert_gradients_close(ours, truth, x, codebook, weights)


def test_strided_inputs_and_gradients():
    x, codebook = (t.detach() for t in _leaves((12, 30), (9, 24)))
    weight = _leaves((30, 12), seed=1)[0].detach()
    plain = None
    for rows, codes in (
        (x.t().contiguous(), codebook[:, ::2].contiguous()),
        (x.t(), codebook[:, ::2]),
        (torch.cat([x.t(), x.t()], dim=1)[:, 12:], codebook[:, ::2]),
    ):
        rows, codes = rows.detach().requires_grad_(), codes.detach().requires_grad_()
        output = ops.vector_quantize(rows, codes, gradient="rotation")
        # Every second loss, in turned memory, and one number for all.
        (output.quantized.t() * weight.t()).sum().backward(retain_graph=True)
        (output.commitment[::2].sum() + output.codebook.mean()).backward()
        results = [*output, rows.grad, codes.grad]
        plain = plain or results
        assert all(torch.equal(a, b) for a, b in zip(results, plain))


@pytest.mark.parametrize("wanted", ["quantized", "commitment", "codebook"])
def test_one_gradient_alone(wanted):
    x, codebook = _leaves((20, 5), (4, 5))
    output = ops.vector_quantize(x, codebook)
    getattr(output, wanted).sum().backward()
    q = codebook.detach()[output.indices]
    if wanted == "codebook":
        pull = 2 * (q - x.detach()).double()
        expected = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, output.indices, pull)
        torch.testing.assert_close(codebook.grad.double(), expected)
        assert x.grad is None
    else:
        expected = torch.ones_like(q) if wanted == "quantized" else 2 * (x.detach() - q)
        assert torch.equal(x.grad, expected)
        assert codebook.grad is None


def test_a_codebook_changed_before_backward_is_refused():
    x, codebook = _leaves((20, 5), (4, 5))
    output = ops.vector_quantize(x, codebook)
    with torch.no_grad():
        codebook.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.commitment.sum().backward()


def test_second_derivatives_are_refused():
    x, codebook = _leaves((20, 5), (4, 5))
    objective = ops.vector_quantize(x, codebook).quantized.square().sum()
    (grad,) = torch.autograd.grad(objective, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_changes_nothing():
    x, codebook = _leaves((20, 5), (4, 5))
    plain = ops.vector_quantize(x, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.vector_quantize(x, codebook)
        sums = ops.code_statistics(x, output.indices, 4)[1]
    assert all(torch.equal(a, b) for a, b in zip(output, plain))
    assert all(a.dtype == b.dtype for a, b in zip(output, plain))
    assert torch.equal(sums, ops.code_statistics(x, output.indices, 4)[1])
    (output.quantized.sum() + output.commitment.sum()).backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradcheck(gradient):
    x, codebook = _leaves((6, 3), (4, 3), dtype=torch.float64)

    # Each loss with its other argument held, as the stop-gradients hold it.
    def commitment(x):
        return ops.vector_quantize(x, codebook, gradient=gradient).commitment

    def codebook_loss(codebook):
        return ops.vector_quantize(x, codebook, gradient=gradient).codebook

    assert torch.autograd.gradcheck(commitment, (x,))
    assert torch.autograd.gradcheck(codebook_loss, (codebook,))


def test_values():
    x, codebook = _leaves((50, 8), (9, 8))
    output = ops.vector_quantize(x, codebook)
    assert torch.equal(output.quantized, codebook[output.indices])
    assert torch.equal(output.indices, ops.nearest_code(x, codebook))
    truth = ((x.double() - codebook.double()[output.indices]) ** 2).sum(1)
    for loss in (output.commitment, output.codebook):
        assert loss.dtype == torch.float32
        assert_within(loss, truth, sum_bound(8 + 2, truth))
    output.quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert codebook.grad is None


def test_rotation_turns_the_input_onto_the_code():
    # The map behind the gradient sends x itself to its code: J·x = q.
    x, codebook = _leaves((5, 4), (3, 4), dtype=torch.float64)
    output = ops.vector_quantize(x, codebook, gradient="rotation")
    for n in range(5):
        jacobian = torch.stack(
            [
                torch.autograd.grad(output.quantized[n, d], x, retain_graph=True)[0][n]
                for d in range(4)
            ]
        )
        torch.testing.assert_close(jacobian @ x[n], output.quantized[n])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_masked_rows(backend):
    x, codebook = _leaves((6, 3), (4, 3))
    mask = torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        x[1] = torch.nan
    output = ops.vector_quantize(x, codebook, mask=mask, backend=backend)
    assert (output.indices[~mask] == -1).all()
    assert (output.quantized[~mask] == 0).all()
    assert (output.commitment[~mask] == 0).all()
    assert (output.codebook[~mask] == 0).all()
    (output.quantized.sum() + output.commitment.sum() + output.codebook.sum()).backward()
    assert (x.grad[~mask] == 0).all()
    assert codebook.grad.isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_broken_row_costs_itself_only(backend):
    x, codebook = _leaves((6, 3), (4, 3))
    with torch.no_grad():
        x[2, 1] = torch.nan
        codebook[3] = torch.inf
    output = ops.vector_quantize(x, codebook, backend=backend)
    assert output.indices[2] == -1
    assert output.quantized[2].isnan().all()
    assert output.commitment[2].isnan()
    good = torch.tensor([0, 1, 3, 4, 5])
    assert output.quantized[good].isfinite().all()
    (output.commitment[good].sum() + output.codebook.nansum() + output.quantized.sum()).backward()
    assert x.grad[good].isfinite().all()
    assert codebook.grad.isfinite().all()
    assert (codebook.grad[3] == 0).all()


def test_dtypes():
    x, codebook = _leaves((10, 4), (5, 4))
    half = x.detach().bfloat16().requires_grad_()
    output = ops.vector_quantize(half, codebook)
    assert output.quantized.dtype == torch.float32
    assert output.commitment.dtype == torch.float32
    (output.quantized.sum() + output.commitment.sum()).backward()
    assert half.grad.dtype == torch.bfloat16
    both = ops.vector_quantize(half, codebook.bfloat16())
    assert both.quantized.dtype == torch.bfloat16
    assert both.codebook.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codebook_used_twice_adds_up(dtype):
    x, codebook = _leaves((10, 4), (5, 4), dtype=dtype)
    ops.vector_quantize(x, codebook).codebook.sum().backward()
    once = codebook.grad.clone()
    codebook.grad = None
    twice = ops.vector_quantize(x, codebook).codebook + ops.vector_quantize(x, codebook).codebook
    twice.sum().backward()
    torch.testing.assert_close(codebook.grad, 2 * once)


def test_repeatable():
    x, codebook = _leaves((5000, 16), (64, 16))
    grads = []
    for _ in range(2):
        x.grad = codebook.grad = None
        output = ops.vector_quantize(x, codebook)
        (output.quantized.sum() + output.codebook.sum()).backward()
        grads.append((x.grad, codebook.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_opcheck():
    x, codebook = (t.detach() for t in _leaves((10, 4), (5, 4)))
    mask = torch.arange(10) > 3
    raw = torch.ops.fastvq
    torch.library.opcheck(raw.vector_quantize.default, (x, codebook, mask, "l2", "cpp"))
    torch.library.opcheck(raw.vector_quantize.default, (x, codebook, None, "dot", "reference"))
    indices = ops.nearest_code(x, codebook)
    for grad_quantized, grad_loss, backend in (
        (x, x[:, 0], "cpp"),
        (None, x[:, 0], "cpp"),
        (x, None, "reference"),
    ):
        torch.library.opcheck(
            raw.vector_quantize_backward_x.default,
            (grad_quantized, grad_loss, x, codebook, indices, "rotation", backend),
        )
    for backend in ("cpp", "reference"):
        torch.library.opcheck(
            raw.vector_quantize_backward_codebook.default,
            (x[:, 0], x, codebook, indices, backend),
        )


def test_training_step_compiles_to_one_graph():
    x, codebook = _leaves((40, 4), (5, 4))
    mask = torch.arange(40) % 3 > 0

    def loss(x, codebook):
        output = ops.vector_quantize(x, codebook, mask=mask, gradient="rotation")
        return output.quantized.square().sum() + output.commitment.sum() + output.codebook.sum()

    loss(x, codebook).backward()
    eager = x.grad.clone(), codebook.grad.clone()
    x.grad = codebook.grad = None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x, codebook).backward()
    for ours, compiled in zip(eager, (x.grad, codebook.grad)):
        torch.testing.assert_close(ours, compiled)


def test_inductor_gives_the_same_index():
    x, codebook = (t.detach() for t in _leaves((40, 4), (5, 4)))
    compiled = torch.compile(ops.vector_quantize, fullgraph=True)
    assert torch.equal(compiled(x, codebook).indices, ops.nearest_code(x, codebook))


def test_bad_input():
    x, codebook = torch.ones(4, 3), torch.ones(2, 3)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        ops.vector_quantize(x, codebook, mask=torch.ones(4))
    with pytest.raises(ValueError, match=r"mask must be \(4,\).*got \(3,\)"):
        ops.vector_quantize(x, codebook, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match='gradient must be "straight_through" or "rotation"'):
        ops.vector_quantize(x, codebook, gradient="none")


def test_no_rows_give_the_codebooks_of_all_heads_no_gradient():
    for _ in range(5):
        torch.full((3, 4, 5), 7.0)  # what fresh memory may hold
        codebook = torch.randn(3, 4, 5, requires_grad=True)
        out = ops.vector_quantize(torch.empty(3, 0, 5), codebook)
        (grad,) = torch.autograd.grad(out.codebook.sum(), codebook)
        assert not grad.any()
