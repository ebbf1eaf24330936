"""Suites: checked before they are timed, absent rivals named, every suite runs."""

import sys

import pytest
import torch

from benchmarks import suites
from benchmarks.nn import quantizers
from benchmarks.ops import code_statistics, nearest_code, vector_quantize
from fastvq import ops

CONTEXT = suites.Context(threads=1, seconds=0.0)


@pytest.mark.parametrize("name", suites.SUITES)
def test_quick_run_of_every_suite(name, capsys, monkeypatch):
    # Compiling takes longer than everything else here.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (result,) = suites.run_suite(name, CONTEXT, quick=True, record=False)
    assert result["cache"] == "warm"
    assert result["unit"] == "ms"
    assert all(timing["p50"] > 0 for timing in result["timings"].values())
    printed = capsys.readouterr().out
    assert all(candidate in printed for candidate in result["timings"])


def test_a_rival_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (result,) = suites.run_suite("nearest_code", CONTEXT, quick=True, record=False)
    assert "FAISS IndexFlatL2" not in result["timings"]
    assert "ModuleNotFoundError" in result["absent"]["FAISS IndexFlatL2"]
    assert "FAISS IndexFlatL2" in capsys.readouterr().out


def test_a_rival_that_computes_something_else_gets_no_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(
        nearest_code, "_search_by_cdist", lambda x, codebook: torch.zeros(len(x)).long()
    )
    prepared = nearest_code.prepare(nearest_code.QUICK_CASES[0], CONTEXT)
    assert "rows differ from the exact index" in prepared.absent["torch.cdist + argmin"]


def test_a_wrong_index_of_ours_stops_the_run(monkeypatch):
    right = ops.nearest_code
    monkeypatch.setattr(ops, "nearest_code", lambda x, codebook: right(x, codebook).roll(1))
    with pytest.raises(RuntimeError, match="not exact"):
        nearest_code.prepare(nearest_code.QUICK_CASES[0], CONTEXT)


def test_a_wrong_sum_of_ours_stops_the_run(monkeypatch):
    right = ops.code_statistics

    def wrong(x, indices, num_codes):
        counts, sums = right(x, indices, num_codes)
        return counts, sums + 1e-6

    monkeypatch.setattr(ops, "code_statistics", wrong)
    with pytest.raises(RuntimeError, match="no time is reported"):
        code_statistics.prepare(code_statistics.QUICK_CASES[0], CONTEXT)


def test_a_wrong_gradient_of_ours_stops_the_run(monkeypatch):
    right = ops.vector_quantize

    def wrong(x, codebook, *, gradient, backend):
        scale = 1.0 if backend == "reference" else 1.01
        return right(x * scale, codebook * scale, gradient=gradient, backend=backend)

    monkeypatch.setattr(ops, "vector_quantize", wrong)
    with pytest.raises(AssertionError, match="not close"):
        vector_quantize.prepare(vector_quantize.QUICK_CASES[0], CONTEXT)


@pytest.mark.parametrize("name", quantizers._MODULES)
def test_quantizers_are_checked_against_the_modules_they_replace(name):
    pytest.importorskip("vector_quantize_pytorch")
    prepared = quantizers.prepare({"module": name, "B": 1, "N": 64}, CONTEXT)
    assert prepared.absent == {}
    assert prepared.notes == {"vector-quantize-pytorch": "same results"}


def test_a_quantizer_with_another_gradient_gets_no_time(monkeypatch):
    peer = pytest.importorskip("vector_quantize_pytorch")
    forward = peer.FSQ.forward
    monkeypatch.setattr(peer.FSQ, "forward", lambda self, z: forward(self, 1.01 * z))
    prepared = quantizers.prepare(quantizers.QUICK_CASES[0], CONTEXT)
    assert "vector-quantize-pytorch" not in prepared.candidates
    assert "vector-quantize-pytorch" in prepared.absent


def test_every_size_of_the_targets_is_there():
    for suite in map(suites.load, ("nearest_code", "vector_quantize", "code_statistics")):
        cpu = {tuple(case[key] for key in "NKD") for case in suite.CASES["cpu"]}
        cuda = {tuple(case[key] for key in "NKD") for case in suite.CASES["cuda"]}
        assert {(32768, 512, 64), (16384, 8192, 256), (32768, 16384, 8)} <= cpu
        assert {(131072, 512, 64), (65536, 65536, 128)} <= cuda
