"""Suites: checked before they are timed, absent rivals named, every suite runs."""

import re

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import running, suites
from benchmarks.end_to_end import stage1_step
from benchmarks.isolated import TimesItself
from benchmarks.nn import quantizers
from benchmarks.ops import code_statistics, nearest_code, vector_quantize
from fastvq import ops

CONTEXT = suites.Context(threads=1, seconds=0.0)


class Worker(TimesItself):
    """In the place of `Isolated`: the quick case's exact indices, without a process."""

    def __init__(self, function, arrays, threads):
        self._indices = ops.nearest_code(*map(torch.from_numpy, arrays.values())).numpy()

    def __call__(self):
        return None

    def result(self) -> np.ndarray:
        return self._indices

    def time_ms(self, cold=False):
        return 1.0

    def peak_bytes(self):
        return None

    def close(self):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    # Compiling and starting processes take longer than everything else here.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(nearest_code, "Isolated", Worker)


def quick_run(name):
    (result,) = running.run_suite(
        name, CONTEXT, cases=suites.load(name).QUICK_CASES[:1], record=False
    )
    return result


@pytest.mark.parametrize("name", suites.SUITES)
def test_quick_run_of_every_suite(name, capsys):
    result = quick_run(name)
    assert result["cache"] == "warm"
    assert result["unit"] == "ms"
    assert next(iter(result["timings"])).startswith("fastvq")
    assert all(timing["p50"] > 0 for timing in result["timings"].values())
    assert result["timings"].keys() == result["peak_bytes"].keys() == result["fraction"].keys()
    assert result["work"]["bytes"] > 0
    assert result["roofline"]["copy_bytes_per_s"] > 1e8
    assert len(result["sources"]) == 16
    printed = capsys.readouterr().out
    assert all(candidate in printed for candidate in result["timings"])


def test_the_fraction_is_of_the_longer_of_products_and_traffic():
    result = quick_run("nearest_code")
    work, roofline = result["work"], result["roofline"]
    assert work["flops"] == 2 * 4096 * 512 * 64
    assert work["bytes"] == 4 * (4096 + 512) * 64 + 8 * 4096
    products = work["flops"] / roofline["matrix_flops_per_s"]
    traffic = work["bytes"] / roofline["copy_bytes_per_s"]
    assert roofline["floor_ms"] == pytest.approx(1e3 * max(products, traffic))
    ours = result["timings"]["fastvq"]["p50"]
    assert result["fraction"]["fastvq"] == pytest.approx(roofline["floor_ms"] / ours)


def test_a_rival_that_is_not_installed_is_named(monkeypatch, capsys):
    def missing(function, arrays, threads):
        raise RuntimeError("ModuleNotFoundError: No module named 'faiss'")

    monkeypatch.setattr(nearest_code, "Isolated", missing)
    result = quick_run("nearest_code")
    assert "FAISS IndexFlatL2" not in result["timings"]
    assert "No module named 'faiss'" in result["absent"]["FAISS IndexFlatL2"]
    assert "CUDA devices only" in result["absent"]["flash-kmeans"]
    assert "FAISS IndexFlatL2" in capsys.readouterr().out


def test_a_rival_that_computes_something_else_gets_no_time(monkeypatch):
    monkeypatch.setattr(
        nearest_code, "_search_by_cdist", lambda x, codebook: torch.zeros(len(x)).long()
    )
    prepared = nearest_code.prepare(nearest_code.QUICK_CASES[0], CONTEXT)
    prepared.keep({"fastvq", "torch.cdist + argmin"})
    prepared.build()
    assert list(prepared.candidates) == ["fastvq"]
    assert "rows differ from the exact index" in prepared.absent["torch.cdist + argmin"]


def test_a_red_check_leaves_no_time(monkeypatch, capsys):
    right = ops.nearest_code
    monkeypatch.setattr(ops, "nearest_code", lambda x, codebook: right(x, codebook).roll(1))
    result = quick_run("nearest_code")
    assert "not exact" in result["red"]
    assert result["timings"] == {}
    assert "RED, no times" in capsys.readouterr().out
    assert command.main(["nearest_code", "--quick", "--threads", str(torch.get_num_threads())]) == 1


def test_a_wrong_sum_of_ours_is_red(monkeypatch):
    right = ops.code_statistics

    def wrong(x, indices, num_codes):
        counts, sums = right(x, indices, num_codes)
        return counts, sums + 1e-6

    monkeypatch.setattr(ops, "code_statistics", wrong)
    with pytest.raises(suites.WrongResult, match="no time is reported"):
        code_statistics.prepare(code_statistics.QUICK_CASES[0], CONTEXT)


def test_a_wrong_gradient_of_ours_is_red(monkeypatch):
    right = ops.vector_quantize

    def wrong(x, codebook, *, gradient, backend):
        scale = 1.0 if backend == "reference" else 1.01
        return right(x * scale, codebook * scale, gradient=gradient, backend=backend)

    monkeypatch.setattr(ops, "vector_quantize", wrong)
    with pytest.raises(suites.WrongResult, match="not close"):
        vector_quantize.prepare(vector_quantize.QUICK_CASES[0], CONTEXT)


def test_a_rival_with_another_gradient_gets_no_time(monkeypatch):
    monkeypatch.setattr(vector_quantize.F, "mse_loss", lambda x, q: 2 * (x - q).square().mean())
    prepared = vector_quantize.prepare(vector_quantize.QUICK_CASES[0], CONTEXT)
    prepared.keep({"plain torch"})
    prepared.build()
    assert "not close" in prepared.absent["plain torch"]


@pytest.mark.parametrize("name", quantizers._MODULES)
def test_quantizers_are_checked_against_the_modules_they_replace(name):
    pytest.importorskip("vector_quantize_pytorch")
    prepared = quantizers.prepare({"module": name, "B": 1, "N": 64}, CONTEXT)
    prepared.build()
    assert prepared.absent == {}
    assert prepared.notes == {"vector-quantize-pytorch": "same results"}


def test_a_quantizer_with_another_gradient_gets_no_time(monkeypatch):
    peer = pytest.importorskip("vector_quantize_pytorch")
    forward = peer.FSQ.forward
    monkeypatch.setattr(peer.FSQ, "forward", lambda self, z: forward(self, 1.01 * z))
    prepared = quantizers.prepare(quantizers.QUICK_CASES[0], CONTEXT)
    prepared.build()
    assert "vector-quantize-pytorch" not in prepared.candidates
    assert "vector-quantize-pytorch" in prepared.absent


def test_models_of_the_end_to_end_step_train_alike():
    for model in ("vqvae", "vqvae2"):
        case = {**stage1_step.QUICK_CASES[0], "model": model}
        prepared = stage1_step.prepare(case, CONTEXT)
        prepared.build()
        assert prepared.absent == {}
        first = {name: run() for name, run in prepared.candidates.items()}
        second = {name: run() for name, run in prepared.candidates.items()}
        for name in prepared.candidates:
            # Losses meet before the codes have moved, and stay close after.
            ours = "fastvq.Codebook"
            torch.testing.assert_close(first[name][0], first[ours][0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(second[name][0], second[ours][0], rtol=1e-2, atol=1e-3)


def test_an_end_to_end_model_with_another_loss_gets_no_time(monkeypatch):
    right = stage1_step._one_hot

    def wrong(x, embed):
        quantized, indices, commitment, counts, sums = right(x, embed)
        return quantized, indices, 2 * commitment + 1, counts, sums

    monkeypatch.setattr(stage1_step, "_one_hot", wrong)
    prepared = stage1_step.prepare(stage1_step.QUICK_CASES[0], CONTEXT)
    prepared.keep({"one-hot quantizer"})
    prepared.build()
    assert "not close" in prepared.absent["one-hot quantizer"]


def test_every_size_of_the_targets_is_there():
    for suite in map(suites.load, ("nearest_code", "vector_quantize", "code_statistics")):
        cpu = {tuple(case[key] for key in "NKD") for case in suite.CASES["cpu"]}
        cuda = {tuple(case[key] for key in "NKD") for case in suite.CASES["cuda"]}
        assert {(32768, 512, 64), (16384, 8192, 256), (32768, 16384, 8)} <= cpu
        assert {(131072, 512, 64), (65536, 65536, 128)} <= cuda


def test_the_command_names_its_suites_and_refuses_others(capsys):
    assert command.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(suites.SUITES)
    for wrong, message in (
        (["searching"], "suite must be one of"),
        (["nearest_code", "--case", "K=3"], "no case with"),
        (["nearest_code", "--case", "K"], "KEY=VALUE"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(wrong)
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_one_case_is_chosen_by_its_values():
    assert suites.parse_case("N=64,skew=0.5,module=FSQ") == {"N": 64, "skew": 0.5, "module": "FSQ"}
