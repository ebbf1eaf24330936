"""The definition of truth against the promise spelled out in numpy."""

import pytest
import torch
from ops.nearest_code_cases import KINDS, hostile, ordered_argmin

from fastvq.reference import nearest_code as module
from fastvq.reference.nearest_code import nearest_code, ordered_scores


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "d"), [(37, 29, 3), (64, 100, 16), (5, 1, 1), (1, 300, 64)])
def test_equals_the_ordered_sum(kind, metric, n, k, d):
    x, codebook = hostile(kind, n, k, d)
    indices, _ = nearest_code(x, codebook, metric=metric)
    assert torch.equal(indices, ordered_argmin(x, codebook, metric))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reads_every_dtype(dtype):
    x, codebook = (t.to(dtype) for t in hostile("duplicates", 50, 30, 8))
    assert torch.equal(nearest_code(x, codebook)[0], ordered_argmin(x, codebook))


def test_blocks_do_not_matter(monkeypatch):
    x, codebook = hostile("integers", 41, 17, 5)
    whole = nearest_code(x, codebook)
    monkeypatch.setattr(module, "PAIRS_PER_BLOCK", 1)
    for a, b in zip(whole, nearest_code(x, codebook)):
        assert torch.equal(a, b)


def test_float64_scores_that_overflow_go_to_the_lowest_index():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    codebook = torch.tensor([[1e200, 0.0], [0.0, 1e300], [3e200, 1.0]], dtype=torch.float64)
    assert nearest_code(x, codebook)[0].item() == 0
    near = torch.cat([codebook, torch.tensor([[2.0, 2.0]], dtype=torch.float64)])
    assert nearest_code(x, near)[0].item() == 3
    assert nearest_code(codebook[2:], near)[0].item() == 2


def test_heads_and_shared_codebook():
    x, _ = hostile("random", 30, 1, 4)
    books = torch.randn(3, 7, 4)
    heads = x.reshape(3, 10, 4)
    indices, distance = nearest_code(heads, books)
    for h in range(3):
        assert torch.equal(indices[h], ordered_argmin(heads[h], books[h]))
    shared, _ = nearest_code(heads, books[0])
    assert torch.equal(shared.flatten(), ordered_argmin(x, books[0]))
    assert distance.shape == (3, 10)


def test_distance_is_the_deciding_score():
    x, codebook = hostile("random", 20, 9, 6)
    indices, distance = nearest_code(x.double(), codebook.double())
    score = ordered_scores(x.double(), codebook.double()[indices], "l2")
    assert torch.equal(distance, score)


def test_never_allocates_all_pairs():
    n, k = 5000, 3000
    x, codebook = hostile("random", n, k, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        nearest_code(x, codebook)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # A block holds PAIRS_PER_BLOCK float64 scores; all pairs would be 14 times that.
    assert 0 < largest <= 8 * module.PAIRS_PER_BLOCK + 4096 < n * k * 8 // 4
