"""The C++ row executor: the same codes, logits and doubts as the plain PyTorch ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampling.priors import MODELS, RULES, build_prior, conditioning_of, known_codes
from torch import Tensor

from fastvq import sampling
from fastvq.models.pixelcnn import PixelCNN
from fastvq.ops.backends import CPU_EXTENSION
from fastvq.sampling import cpu_rows, loop
from fastvq.sampling.cpu_rows import CpuRowExecutor
from fastvq.sampling.draw import Filter, draw, logit_tolerance
from fastvq.sampling.noise import gumbel_noise

pytestmark = pytest.mark.skipif(CPU_EXTENSION is None, reason="the C++ core is not built")
ISAS = ("generic", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if CPU_EXTENSION is None or request.param not in CPU_EXTENSION.isa_available():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("FASTVQ_CPU_ISA", request.param)
    return request.param


def _by_torch(model: PixelCNN, *args: Any, **options: Any) -> Tensor:
    """The cached method on the plain PyTorch executor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_rows, "can_run", lambda plan: False)
        return model.sample(*args, **options)


@pytest.mark.parametrize("name", MODELS)
def test_gives_the_codes_of_the_plain_executor(name: str, isa: str) -> None:
    model = build_prior(name)
    for (rule, options), pattern in zip(
        RULES.items(), ("none", "scattered", "top half", "none", "bottom half", "scattered")
    ):
        shape = (5, 4) if rule == "cold" else (3, 7)
        arguments = {
            **options,
            **conditioning_of(name, 5, shape),
            "given": known_codes(5, shape, pattern),
        }
        codes = model.sample(shape, 5, seed=7, **arguments)
        assert torch.equal(codes, _by_torch(model, shape, 5, seed=7, **arguments)), rule


@pytest.mark.parametrize("channels", [3, 17, 40])
def test_widths_that_fill_no_vector(channels: int, isa: str) -> None:
    torch.manual_seed(0)
    model = PixelCNN(21, channels, 3, attention_every=3, attention_heads=1)
    codes = model.sample((4, 5), 6, seed=1)
    assert torch.equal(codes, _by_torch(model, (4, 5), 6, seed=1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_within_the_tolerance(name: str, isa: str) -> None:
    model, shape, n = build_prior(name).eval(), (4, 5), 5
    arguments = conditioning_of(name, n, shape)
    request = _request(model, shape, n, Filter())
    conditioning = sampling.Conditioning(arguments.get("class_labels"), arguments.get("condition"))
    codes = torch.full((n, *shape), -1)
    seen = []
    with torch.no_grad():
        executor = CpuRowExecutor(model._plan(), conditioning, request)
        for row in range(shape[0]):
            assert not list(executor.draw_row(codes, row))
            seen.append(executor._logits.clone())  # of the row's last column
        if "condition" in arguments:
            arguments["condition"] = arguments["condition"].double()
        expected = model.double()(codes, **arguments)[..., -1]
    for row, logits in enumerate(seen):
        error = (logits - expected[:, :, row]).abs()
        assert (error <= logit_tolerance(expected[:, :, row])).all()


def _request(model: PixelCNN, shape: tuple[int, int], n: int, rule: Filter, seed: int = 3) -> Any:
    cpu, drawn = torch.device("cpu"), {"seed": seed, "first_sample": 2, "level": 1}
    return sampling.make_request(
        shape, n, num_codes=model.num_codes, device=cpu, **rule._asdict(), **drawn
    )


def _constant(logits: Tensor) -> PixelCNN:
    """A prior whose logits are these everywhere."""
    model = PixelCNN(len(logits), 4, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.head[3].bias.copy_(logits)
    return model


@pytest.mark.parametrize(
    "rule",
    [
        Filter(),
        Filter(0.02),
        Filter(1e-4),
        Filter(30.0),
        Filter(0.0),
        Filter(1.0, 5),
        Filter(1.0, None, 0.6),
        Filter(0.3, 20, 0.9),
        Filter(1.0, 1),
        Filter(1.0, 40),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("threads", [1, 3])
def test_draws_and_doubts_as_python_does(
    threads: int, rule: Filter, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both on the same logits; with a small spread many draws are close, and ranges of samples
    stop at columns of their own.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    n, width = 4, 50
    logits = spread * torch.randn(40, generator=torch.Generator().manual_seed(5))
    logits[7] = logits[3]
    logits[11] = logits.max() - 1e-5
    model = _constant(logits)
    request = _request(model, (1, width), n, rule)
    samples = torch.arange(2, 2 + n)
    noise = gumbel_noise(3, samples, 1, torch.arange(width), 40)
    codes, doubts = torch.full((n, 1, width), -1), torch.zeros(n, width, dtype=torch.bool)
    executor = CpuRowExecutor(model._plan(), sampling.Conditioning(None, None), request)
    for column, doubtful, seen in executor.draw_row(codes, 0):
        assert torch.equal(seen[doubtful], logits.expand_as(seen)[doubtful])
        doubts[:, column] |= doubtful
        codes[doubtful, 0, column] = 0
    drawn = [draw(logits.expand(n, -1), None if not rule.temperature else g, rule) for g in noise]
    expected = torch.stack([d.codes for d in drawn], dim=1)
    assert torch.equal(doubts, torch.stack([d.doubtful for d in drawn], dim=1))
    assert torch.equal(codes[:, 0][~doubts], expected[~doubts])


def test_every_draw_in_doubt_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    class Counting(loop.Settler):
        def settle(self, *args: Any) -> Tensor:
            settled = super().settle(*args)
            counts.append(len(settled))
            return settled

    monkeypatch.setattr(loop, "Settler", Counting)
    model = _constant(torch.zeros(6))
    known = known_codes(3, (2, 5), "scattered").clamp(max=5)
    codes = model.sample((2, 5), 3, temperature=0.0, given=known)
    assert torch.equal(codes, torch.where(known < 0, 0, known))
    assert sum(counts) == int((known < 0).sum())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_batches_do_not_matter(threads: int) -> None:
    model = build_prior("everything")
    arguments = conditioning_of("everything", 7, (4, 5))
    before = torch.get_num_threads()
    whole = model.sample((4, 5), 7, seed=0, **arguments)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(whole, model.sample((4, 5), 7, seed=0, **arguments))
        for start, stop in ((0, 2), (2, 7)):
            part = {key: value[start:stop] for key, value in arguments.items()}
            codes = model.sample((4, 5), stop - start, seed=0, first_sample=start, **part)
            assert torch.equal(codes, whole[start:stop])
    finally:
        torch.set_num_threads(before)


def test_float64_priors_stay_in_float64() -> None:
    assert not cpu_rows.can_run(build_prior("plain").double()._plan())
