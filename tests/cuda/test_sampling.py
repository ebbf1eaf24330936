"""What only a GPU can show of sampling: graphs, other devices' codes, no waiting inside a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling.priors import MODELS, RULES, build_prior, conditioning_of, known_codes

from fastvq import sampling
from fastvq.models import PixelCNN
from fastvq.sampling import gpu_rows
from fastvq.sampling.gpu_rows import GpuMapExecutor, one_by_one

pytestmark = pytest.mark.cuda
SHAPE, N = (5, 7), 3


def _both(name: str, rule: str, pattern: str, n: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Codes drawn on the GPU by the cached method, and on the CPU by whole forwards."""
    model = build_prior(name).to(dtype)
    arguments = {**RULES[rule], **conditioning_of(name, n, SHAPE), "seed": 4}
    arguments["given"] = known_codes(n, SHAPE, pattern)
    expected = model.sample(SHAPE, n, method="full", **arguments)
    assert gpu_rows.can_run(model.cuda()._plan())
    return model.sample(SHAPE, n, **arguments).cpu(), expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_draws_the_codes_of_the_cpu(name: str, rule: str) -> None:
    codes, expected = _both(name, rule, "scattered", N, torch.float32)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 40])
def test_weights_of_sixteen_bits(n: int, dtype: torch.dtype) -> None:
    codes, expected = _both("everything", "all three", "none", n, dtype)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("n", [1, 16, 17])
def test_graphs_change_no_code(n: int) -> None:
    model = build_prior("everything").cuda()
    told = {key: value.cuda() for key, value in conditioning_of("everything", n, SHAPE).items()}
    drawn = []
    for launcher in (None, one_by_one):
        codes = known_codes(n, SHAPE, "top half").cuda()
        with torch.inference_mode():
            executor = _executor(model, n, told, launcher)
            for _ in range(2):  # a second map finds nothing of the first
                again = codes.clone()
                executor.draw(again)
                drawn.append(again)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def _executor(
    model: PixelCNN, n: int, told: dict[str, torch.Tensor], launcher: Any
) -> GpuMapExecutor:
    cuda = torch.device("cuda")
    request = sampling.make_request(SHAPE, n, num_codes=model.num_codes, device=cuda, seed=1)
    conditioning = sampling.Conditioning(told.get("class_labels"), told.get("condition"))
    return GpuMapExecutor(model._plan(), conditioning, request, launcher=launcher)


def test_nothing_waits_inside_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model, n = build_prior("everything").cuda(), 4
    told = {key: value.cuda() for key, value in conditioning_of("everything", n, SHAPE).items()}
    with torch.inference_mode():
        executor = _executor(model, n, told, None)
        codes = known_codes(n, SHAPE, "none").cuda()
        executor.draw(codes.clone())  # compiles and captures
        for name in ("_start_row", "_draw_code"):
            monkeypatch.setattr(executor, name, _refusing_to_wait(getattr(executor, name)))
        executor.draw(codes)
    assert (codes >= 0).all()


def _refusing_to_wait(function: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def test_verified_codes_are_the_same() -> None:
    model = build_prior("attention").cuda()
    codes = model.sample((8, 8), 20, seed=0)
    assert torch.equal(codes, model.sample((8, 8), 20, seed=0, verify=True))


def test_the_bar_counts_what_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    build_prior("plain").cuda().sample((3, 4), 2, seed=0, progress=True)
    assert "24.0/24.0" in capsys.readouterr().err
