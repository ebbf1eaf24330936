"""The models that text runs are compared with: a normalised n-gram, compressors charged fairly."""

from __future__ import annotations

import math

import pytest

from fastvq.train.text_baselines import NGram, compressor_bits

LINES = [b"the cat sat on the mat", b"the dog sat", b"a cat and a dog"]


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize("context", [b"", b"\n", b"the ca", b"never seen", b"t sat on the ma"])
def test_probabilities_sum_to_one(order: int, context: bytes) -> None:
    model = NGram(LINES, order)
    # 256 terms of float64, each from at most six divisions
    total = math.fsum(model.probability(context, symbol) for symbol in range(256))
    assert total == pytest.approx(1.0, abs=1e-13)
    assert min(model.probability(context, symbol) for symbol in range(256)) > 0


def test_follows_its_equation() -> None:
    """After 'a' came 'b' twice and the end once: Witten-Bell by hand."""
    model = NGram([b"ab", b"ab", b"a"], 1)
    counts = {ord("a"): 3, ord("b"): 2, ord("\n"): 3}
    below = (counts[ord("b")] + 3 / 256) / (8 + 3)
    assert model.probability(b"xa", ord("b")) == pytest.approx((2 + 2 * below) / (3 + 2), rel=1e-12)
    expected = -sum(
        math.log2(p)
        for p in (model.probability(b"\n", ord("a")), model.probability(b"a", ord("\n")))
    )
    assert model.bits([b"a"]) == pytest.approx(expected / 2, rel=1e-12)


def test_more_context_helps_on_what_was_seen() -> None:
    bits = [NGram(LINES, order).bits(LINES) for order in (0, 1, 3, 5)]
    assert bits == sorted(bits, reverse=True)
    assert NGram([], 3).bits(LINES) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="order must be 0 or more"):
        NGram(LINES, -1)


def test_compressors_are_charged_for_the_held_out_lines_alone() -> None:
    known = compressor_bits(LINES * 50, LINES)
    unknown = compressor_bits([b"x"] * 50, LINES)
    assert set(known) == {"gzip", "bzip2", "xz"}
    assert known["gzip"] < unknown["gzip"]
    assert 0 < unknown["gzip"] < 8.5
