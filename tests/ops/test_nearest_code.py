"""nearest_code: every backend gives the promised index."""

import numpy as np
import pytest
import torch
from ops.nearest_code_cases import KINDS, hostile, ordered_argmin
from tolerances import UNIT_ROUNDOFF, assert_within

import fastvq
from fastvq import ops

BACKENDS = ["cpp", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("kind", KINDS)
def test_index_promise(kind, metric, backend):
    for n, k, d in [(33, 17, 1), (70, 130, 31), (9, 64, 64)]:
        x, codebook = hostile(kind, n, k, d)
        indices = ops.nearest_code(x, codebook, metric=metric, backend=backend)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, ordered_argmin(x, codebook, metric))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("code_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_dtypes(x_dtype, code_dtype, backend):
    x, codebook = hostile("integers", 40, 33, 7)
    x, codebook = (x * 1.3).to(x_dtype), (codebook * 1.3).to(code_dtype)
    assert torch.equal(ops.nearest_code(x, codebook, backend=backend), ordered_argmin(x, codebook))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shapes(backend):
    wide = torch.randn(20, 30)
    x = wide[3:17, 1:25:3]
    codebook = torch.randn(8, 11).T[:, :8]
    assert torch.equal(ops.nearest_code(x, codebook, backend=backend), ordered_argmin(x, codebook))
    repeated = torch.randn(1, 8).expand(6, 8)
    assert len(ops.nearest_code(repeated, codebook, backend=backend).unique()) == 1
    unaligned = torch.randn(1 + 14 * 8)[1:].view(14, 8)
    assert torch.equal(
        ops.nearest_code(unaligned, codebook, backend=backend), ordered_argmin(unaligned, codebook)
    )
    assert ops.nearest_code(torch.empty(0, 8), codebook, backend=backend).shape == (0,)
    assert ops.nearest_code(torch.empty(2, 0, 8), codebook, backend=backend).shape == (2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance(backend):
    x, codebook = hostile("random", 50, 20, 33)
    for metric in ("l2", "dot"):
        indices, distance = ops.nearest_code(
            x, codebook, metric=metric, backend=backend, return_distance=True
        )
        chosen = codebook[indices].double()
        terms = (x.double() - chosen) ** 2 if metric == "l2" else x.double() * chosen
        # The contract's bound: (D+2)·2⁻²⁴ of the sum of the terms' sizes.
        bound = (33 + 2) * UNIT_ROUNDOFF[torch.float32] * terms.abs().sum(1)
        assert_within(distance, terms.sum(1), bound)
    x[4] = torch.inf
    _, distance = ops.nearest_code(x, codebook, backend=backend, return_distance=True)
    assert distance.isnan().nonzero().flatten().tolist() == [4]


def test_threads_do_not_matter():
    x, codebook = hostile("near-duplicates", 3000, 100, 8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.nearest_code(x, codebook))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)
    pieces = torch.cat([ops.nearest_code(part, codebook) for part in x.split(7)])
    assert torch.equal(results[0], pieces)


def test_autocast_does_not_matter():
    x, codebook = hostile("random", 500, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in BACKENDS:
            assert torch.equal(
                ops.nearest_code(x, codebook, backend=backend), ordered_argmin(x, codebook)
            )


def test_float64_takes_the_reference():
    x, codebook = hostile("random", 10, 5, 3)
    indices = ops.nearest_code(x.double(), codebook.double())
    assert torch.equal(indices, ordered_argmin(x, codebook))
    with pytest.raises(RuntimeError, match="read float32, float16 and bfloat16, not float64"):
        ops.nearest_code(x.double(), codebook, backend="cpp")


def test_opcheck():
    x, codebook = hostile("random", 10, 5, 3)
    for backend in BACKENDS:
        for rows, book in [(x, codebook), (x.view(2, 5, 3), codebook)]:
            arguments = (rows, book, "l2", backend)
            torch.library.opcheck(torch.ops.fastvq.nearest_code.default, arguments)


def test_compiles_to_one_graph():
    x, codebook = hostile("random", 40, 5, 3)
    compiled = torch.compile(ops.nearest_code, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codebook), ops.nearest_code(x, codebook))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0], torch.ones(2, 2)), TypeError, "x must be a torch.Tensor; got list"),
        ((torch.ones(2, 2).int(), torch.ones(2, 2)), TypeError, "got int32"),
        ((torch.ones(2), torch.ones(2, 2)), ValueError, r"x must be \(N, D\).*got \(2,\)"),
        (
            (torch.ones(4096, 64), torch.ones(512, 32)),
            ValueError,
            r"codebook must be \(K, 64\) to match x \(4096, 64\); got \(512, 32\)",
        ),
        ((torch.ones(2, 3), torch.ones(0, 3)), ValueError, "at least one code"),
        ((torch.ones(2, 0), torch.ones(1, 0)), ValueError, "at least one channel"),
        ((torch.ones(0, 2, 3), torch.ones(1, 3)), ValueError, "at least one head"),
        ((torch.ones(2, 3, 4), torch.ones(3, 5, 4)), ValueError, r"or \(2, K, 4\)"),
        ((torch.ones(2, 3), torch.ones(1, 3).to("meta")), ValueError, "device of x"),
    ],
)
def test_bad_input_gets_one_line(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        ops.nearest_code(*arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("nearest_code: ")


def test_bad_options():
    x, codebook = torch.ones(2, 3), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r'metric must be "l2" or "dot"; got .cosine.'):
        ops.nearest_code(x, codebook, metric="cosine")
    with pytest.raises(ValueError, match="precision must be"):
        ops.nearest_code(x, codebook, precision="half")
    with pytest.raises(ValueError, match="backend must be one of triton, cpp, reference"):
        ops.nearest_code(x, codebook, backend="cuda")
    with pytest.raises(RuntimeError, match='backend="triton" cannot run'):
        ops.nearest_code(x.double(), codebook, backend="triton")


def test_precision_fast_is_within_its_bound():
    x, codebook = hostile("near-duplicates", 100, 50, 16)
    index = ops.nearest_code(x, codebook, precision="fast")
    d64 = torch.cdist(x.double(), codebook.double()) ** 2
    lengths = x.double().norm(dim=1) + codebook.double().norm(dim=1).max()
    beta = (16 + 4) * UNIT_ROUNDOFF[torch.float32] * lengths**2
    chosen = d64.gather(1, index[:, None]).squeeze(1)
    assert (chosen <= d64.min(dim=1).values + 2 * beta).all()


def test_explain_names_the_choice():
    x, codebook = torch.ones(2, 3), torch.ones(1, 3)
    text = ops.explain("nearest_code", x, codebook)
    assert text.splitlines()[0] == "nearest_code: cpp"
    assert "triton: it runs on cuda tensors and one is on cpu" in text
    text = ops.explain("nearest_code", x.double(), codebook)
    assert text.splitlines()[0] == "nearest_code: reference"
    refused = ops.explain("nearest_code", x.double(), codebook, backend="cpp")
    assert refused.splitlines()[0] == "nearest_code: refused"
    with pytest.raises(ValueError, match="op must be one of"):
        ops.explain("cdist", x)


def test_kmeans_is_exact_too():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 4))).float()
    codebook, indices = fastvq.kmeans(x, 16)
    assert torch.equal(indices, ordered_argmin(x, codebook))
