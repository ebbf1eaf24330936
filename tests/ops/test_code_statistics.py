"""code_statistics: counts and sums against numpy, repeatable, differentiable."""

import numpy as np
import pytest
import torch
from tolerances import assert_within, rounding_bound

from fastvq import ops

BACKENDS = ["cpp", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 2), (1, 1, 1), (500, 7, 3), (300, 1000, 33)])
def test_counts_and_sums(n, k, d, dtype, backend):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g).to(dtype)
    indices = torch.randint(-1, k, (n,), generator=g)
    counts, sums = ops.code_statistics(x, indices, k, backend=backend)
    assert counts.dtype == sums.dtype == torch.float32
    truth = np.zeros((k, d))
    kept = indices.numpy() >= 0
    np.add.at(truth, indices.numpy()[kept], x.double().numpy()[kept])
    assert counts.tolist() == np.bincount(indices.numpy()[kept], minlength=k).tolist()
    # Summed in float64, rounded to float32 once; float64's own error is 2⁻²⁹ of that.
    truth = torch.from_numpy(truth)
    size = torch.zeros(k, d, dtype=torch.float64)
    size.index_add_(0, indices[kept], x.double().abs()[kept])
    assert_within(sums, truth, rounding_bound(truth, torch.float32) + n * 2.0**-52 * size)


def test_backends_agree_to_the_bit():
    x = torch.randn(2000, 5)
    indices = torch.randint(-1, 4, (2000,))
    indices[:1000] = 2
    results = [ops.code_statistics(x, indices, 4, backend=b) for b in BACKENDS for _ in range(2)]
    for counts, sums in results[1:]:
        assert torch.equal(counts, results[0][0])
        assert torch.equal(sums, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_without_rows(backend):
    for _ in range(5):
        torch.full((3, 4, 5), 7.0)  # what fresh memory may hold
        counts, sums = ops.code_statistics(
            torch.empty(3, 0, 5), torch.empty(3, 0, dtype=torch.int64), 4, backend=backend
        )
        assert not counts.any()
        assert not sums.any()


def test_heads():
    x, indices = torch.randn(2, 30, 5), torch.randint(0, 4, (2, 30))
    counts, sums = ops.code_statistics(x, indices, 4)
    for h in range(2):
        alone = ops.code_statistics(x[h], indices[h], 4)
        assert torch.equal(counts[h], alone[0])
        assert torch.equal(sums[h], alone[1])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradcheck(backend):
    indices = torch.tensor([0, 2, -1, 2, 0])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: ops.code_statistics(x, indices, 4, backend=backend)[1], (x,)
    )


def test_opcheck_and_compile():
    x, indices = torch.randn(20, 3), torch.randint(-1, 5, (20,))
    for backend in BACKENDS:
        torch.library.opcheck(torch.ops.fastvq.code_statistics.default, (x, indices, 5, backend))
    compiled = torch.compile(ops.code_statistics, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, indices, 5), ops.code_statistics(x, indices, 5)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("indices", "num_codes", "error", "words"),
    [
        (torch.zeros(4), 3, TypeError, "indices must be an int64 tensor; got torch.float32"),
        (torch.zeros(3).long(), 3, ValueError, r"indices must be \(4,\) to match x \(4, 2\)"),
        (torch.tensor([0, 1, 2, 3]), 3, ValueError, r"in 0 … 2; got 3"),
        (torch.tensor([0, 1, -2, 0]), 3, ValueError, "got -2"),
        (torch.zeros(4).long(), 0, ValueError, "num_codes must be at least 1; got 0"),
        (torch.zeros(4).long(), 2.0, TypeError, "num_codes must be an int; got float"),
    ],
)
def test_bad_input(indices, num_codes, error, words):
    with pytest.raises(error, match=words):
        ops.code_statistics(torch.ones(4, 2), indices, num_codes)
