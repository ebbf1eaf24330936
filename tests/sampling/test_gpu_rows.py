"""The GPU map executor under Triton's interpreter: the same codes, without waiting for a doubt."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling.priors import RULES, build_prior, conditioning_of, known_codes
from torch import Tensor

from fastvq import sampling
from fastvq.models.pixelcnn import PixelCNN
from fastvq.sampling import gpu_rows
from fastvq.sampling.draw import Filter, logit_tolerance
from fastvq.sampling.gpu_rows import GpuMapExecutor

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off"
)
# Each with a rule and known codes of its own: the interpreter takes a tenth of a second a code.
CASES = {
    "plain": ("temperature 1", "scattered"),
    "kernel 7": ("top-p", "none"),
    "first kernel 7": ("greedy", "top half"),
    "dilations": ("top-k", "none"),
    "attention": ("cold", "none"),
    "everything": ("all three", "scattered"),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached method takes the GPU's kernels."""
    real = gpu_rows.can_run
    monkeypatch.setattr(gpu_rows, "can_run", lambda plan: real(plan, interpreted=True))


@pytest.mark.parametrize("name", CASES)
def test_gives_the_codes_of_the_full_method(name: str, interpreted: None) -> None:
    rule, pattern = CASES[name]
    model, shape, n = build_prior(name), (2, 3), 1 if name == "plain" else 2
    arguments = {**RULES[rule], **conditioning_of(name, n, shape), "seed": 4}
    arguments["given"] = known_codes(n, shape, pattern)
    codes = model.sample(shape, n, **arguments)
    assert torch.equal(codes, model.sample(shape, n, method="full", **arguments))


def _request(model: PixelCNN, n: int, shape: tuple[int, int], rule: Filter) -> sampling.Request:
    cpu = torch.device("cpu")
    return sampling.make_request(
        shape, n, num_codes=model.num_codes, device=cpu, **rule._asdict(), seed=0
    )


def _executor(
    model: PixelCNN, request: sampling.Request, told: dict[str, Tensor], **options: Any
) -> GpuMapExecutor:
    conditioning = sampling.Conditioning(told.get("class_labels"), told.get("condition"))
    return GpuMapExecutor(model._plan(), conditioning, request, **options)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_within_the_tolerance(n: int, dtype: torch.dtype) -> None:
    """Of known codes, at the last position, where attention and taps have all there is to see."""
    name, shape = "everything", (2, 3)
    model = build_prior(name).to(dtype).eval()
    told = conditioning_of(name, n, shape)
    codes = known_codes(n, shape, "all")
    codes[:, -1, -1] = -1
    with torch.no_grad():
        executor = _executor(model, _request(model, n, shape, Filter()), told, weights_dtype=dtype)
        logits: list[Tensor] = []
        _spy_on_draws(executor, logits)
        executor.draw(codes)
        told["condition"] = told["condition"].double()
        expected = model.double()(codes, **told)[:, :, -1, -1]
    assert len(logits) == 1
    assert ((logits[0] - expected).abs() <= logit_tolerance(expected)).all()


def _spy_on_draws(executor: GpuMapExecutor, logits: list[Tensor]) -> None:
    draw_code: Callable[[], None] = executor._draw_code

    def spied() -> None:
        draw_code()
        logits.append(executor.logits.clone())

    executor._draw_code = spied


def test_takes_the_same_steps_in_every_row_and_column() -> None:
    """What a CUDA graph holds may not depend on the position: each function is called again."""
    model, shape = build_prior("plain"), (2, 3)
    calls: list[int] = []

    def counting(function: Callable[[], None]) -> Callable[[], None]:
        calls.append(0)
        own = len(calls) - 1

        def run() -> None:
            calls[own] += 1
            function()

        return run

    with torch.no_grad():
        executor = _executor(model, _request(model, 1, shape, Filter()), {}, launcher=counting)
        codes = known_codes(1, shape, "none")
        codes[:, 0, 1] = 2
        doubts = executor.draw(codes)
    assert calls == [2, 5, 1]  # rows, drawn codes, known codes
    assert codes[0, 0, 1] == 2
    assert (codes >= 0).all()
    assert not doubts.any()


def test_what_the_kernels_leave_to_others() -> None:
    assert not gpu_rows.can_run(build_prior("plain")._plan())  # on a CPU, without being asked
    assert not gpu_rows.can_run(build_prior("plain").double()._plan(), interpreted=True)
    with torch.device("meta"):
        wide = PixelCNN(2049, 4, 1)
    assert not gpu_rows.can_run(wide._plan(), interpreted=True)
