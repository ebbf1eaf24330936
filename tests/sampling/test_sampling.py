"""Sampling a PixelCNN: both methods, every option and every split give the same codes."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from sampling.priors import MODELS, RULES, K, build_prior, conditioning_of, known_codes
from torch import Tensor

from fastvq import sampling
from fastvq.models.pixelcnn import PixelCNN
from fastvq.sampling import draw as draw_module
from fastvq.sampling.cached import CachedExecutor
from fastvq.sampling.full import FullExecutor
from fastvq.sampling.loop import Settler
from fastvq.sampling.vertical import VerticalStack

N = 3
SHAPES = [(4, 6), (7, 3), (1, 1), (1, 8), (8, 1)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_the_forward(name: str, shape: tuple[int, int]) -> None:
    model = build_prior(name).double().eval()
    told = conditioning_of(name, N, shape)
    conditioning = sampling.Conditioning(told.get("class_labels"), told.get("condition"))
    if conditioning.condition is not None:
        told["condition"] = told["condition"].double()
        conditioning = conditioning.to(torch.float64)
    codes = torch.randint(0, K, (N, *shape))
    executor = CachedExecutor(model._plan(), conditioning, N, *shape)
    with torch.no_grad():
        expected = model(codes, **told)
        for row in range(shape[0]):
            for column in range(shape[1]):
                seen = codes.clone()
                seen.flatten(1)[:, row * shape[1] + column :] = -1  # must not be read
                got = executor.step(seen, row, column, True)
                # float64, ten layers of sums of at most 16·36 terms, logits near 1
                torch.testing.assert_close(got, expected[:, :, row, column], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_both_methods_give_the_same_codes(name: str, rule: str) -> None:
    model = build_prior(name)
    for shape, pattern in zip(SHAPES, ("scattered", "none", "none", "top half", "bottom half")):
        arguments = {**RULES[rule], **conditioning_of(name, N, shape), "seed": 4}
        arguments["given"] = known_codes(N, shape, pattern)
        cached = model.sample(shape, N, method="cached", **arguments)
        full = model.sample(shape, N, method="full", **arguments)
        assert cached.shape == (N, *shape)
        assert torch.equal(cached, full)
        assert model.training


@pytest.mark.parametrize("method", sampling.METHODS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_batch_splits_and_order_change_nothing(name: str, method: str) -> None:
    model, shape = build_prior(name), (4, 6)
    told = conditioning_of(name, 8, shape)
    arguments: dict[str, Any] = {"seed": 9, "method": method, "top_p": 0.95}
    whole = model.sample(shape, 8, **told, **arguments)
    assert len({tuple(one.flatten().tolist()) for one in whole}) > 1
    for size in (1, 3, 4):
        parts = []
        for first in range(0, 8, size):
            part = {key: value[first : first + size] for key, value in told.items()}
            count = min(size, 8 - first)
            parts.append(model.sample(shape, count, first_sample=first, **part, **arguments))
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("pattern", ["top half", "bottom half", "scattered", "all", "none"])
def test_given_codes_stay_and_the_rest_is_drawn(pattern: str) -> None:
    model, shape = build_prior("plain"), (4, 6)
    given = known_codes(N, shape, pattern)
    for method in sampling.METHODS:
        codes = model.sample(shape, N, given=given, seed=1, method=method)
        assert torch.equal(codes[given >= 0], given[given >= 0])
        assert ((codes >= 0) & (codes < K)).all()
    one = model.sample(shape, N, given=given[0], seed=1)
    assert torch.equal(one, model.sample(shape, N, given=given[:1].expand(N, -1, -1), seed=1))


def test_greedy_is_the_argmax_of_the_forward() -> None:
    model, shape = build_prior("plain").double().eval(), (4, 6)
    codes = model.sample(shape, 1, temperature=0)
    assert torch.equal(model(codes).argmax(dim=1), codes)


def test_seeds_and_levels() -> None:
    model, shape = build_prior("plain"), (4, 6)
    first = model.sample(shape, N, seed=1)
    assert torch.equal(first, model.sample(shape, N, seed=1))
    assert not torch.equal(first, model.sample(shape, N, seed=2))
    assert not torch.equal(first, model.sample(shape, N, seed=1, level=1))
    torch.manual_seed(5)
    fresh = model.sample(shape, N)
    assert not torch.equal(fresh, model.sample(shape, N))
    torch.manual_seed(5)
    assert torch.equal(fresh, model.sample(shape, N))


@pytest.mark.parametrize("method", sampling.METHODS)
def test_frequencies_are_the_probabilities(method: str) -> None:
    torch.manual_seed(0)
    model = PixelCNN(2, 8, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    n = 5000
    maps = torch.cartesian_prod(*[torch.arange(2)] * 4).view(16, 2, 2)
    drawn = model.sample((2, 2), n, seed=0, method=method).flatten(1)
    counts = (drawn @ torch.tensor([8, 4, 2, 1])).bincount(minlength=16)
    with torch.no_grad():
        p = model.double().log_prob(maps).exp()
    # counts of n Bernoulli trials: five standard deviations
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """16-bit weights are sampled in float32, so both methods agree for them as well."""
    model, shape = build_prior("everything").to(dtype), (4, 6)
    told = conditioning_of("everything", N, shape)
    told["condition"] = told["condition"].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = model.sample(shape, N, seed=3, **told)
    assert torch.equal(cached, model.sample(shape, N, seed=3, method="full", **told))
    assert model.embedding.weight.dtype == dtype


class _Disturbed:
    """An executor whose logits are off by up to half of a large tolerance, as rounding might."""

    def __init__(self, executor: FullExecutor, size: float) -> None:
        self._executor, self._size = executor, size

    def step(self, codes: Tensor, row: int, column: int, want_logits: bool) -> Tensor | None:
        logits = self._executor.step(codes, row, column, want_logits)
        return None if logits is None else logits + self._size * torch.randn_like(logits).sign()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settling", [True, False])
def test_settling_makes_disturbed_logits_harmless(
    rule: str, settling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tolerance 0.1 and errors of 0.09 codes stay; without settling they move."""
    model, shape = build_prior("plain"), (6, 8)
    expected = model.sample(shape, 4, seed=11, **RULES[rule])
    monkeypatch.setattr(draw_module, "TOLERANCE", 0.1)
    monkeypatch.setattr(
        "fastvq.sampling.loop.FullExecutor",
        lambda *args: _Disturbed(FullExecutor(*args), 0.09),
    )
    if not settling:
        monkeypatch.setattr(
            Settler,
            "settle",
            lambda self, codes, doubtful, row, column, logits, noise: draw_module.exact_draw(
                logits[doubtful], noise if noise is None else noise[doubtful], self._request.rule
            ),
        )
    torch.manual_seed(0)
    got = model.sample(shape, 4, seed=11, method="full", **RULES[rule])
    assert torch.equal(got, expected) == settling


def test_errors_beyond_the_tolerance_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_prior("plain")
    monkeypatch.setattr(
        "fastvq.sampling.loop.FullExecutor", lambda *args: _Disturbed(FullExecutor(*args), 0.1)
    )
    monkeypatch.setattr(  # doubts everything
        "fastvq.sampling.loop.draw",
        lambda logits, noise, rule: draw_module.Draw(
            logits.argmax(dim=1), torch.ones(len(logits), dtype=torch.bool)
        ),
    )
    with pytest.warns(UserWarning, match=r"float32 logits differ from float64 by 0\.1"):
        model.sample((2, 2), 1, seed=0, method="full")


def test_no_samples_and_results_autograd_may_keep() -> None:
    model = build_prior("everything")
    told = conditioning_of("everything", 0, (3, 4))
    assert model.sample((3, 4), 0, **told).shape == (0, 3, 4)
    told = conditioning_of("everything", 2, (3, 4))
    codes = model.sample((3, 4), 2, seed=0, **told)
    assert not codes.is_inference()
    model.log_prob(codes, **told).sum().backward()
    assert model.embedding.weight.grad is not None


def test_a_label_for_all() -> None:
    model = build_prior("classes")
    labels = torch.full((N,), 2)
    codes = model.sample((3, 4), N, class_labels=labels, seed=0)
    assert torch.equal(codes, model.sample((3, 4), N, class_labels=2, seed=0))


@pytest.mark.parametrize("method", sampling.METHODS)
def test_weights_that_are_not_finite(method: str) -> None:
    model = build_prior("plain")
    model.head[3].bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="logits at row 0, column 0 must be finite"):
        model.sample((2, 2), 1, method=method)


def test_progress_counts_codes_and_interrupts_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_prior("plain")
    model.sample((3, 4), 2, progress=True)
    assert "24.0/24.0" in capsys.readouterr().err

    def interrupted(self: VerticalStack, codes: Tensor, row: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VerticalStack, "start_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.sample((3, 4), 2, progress=True)
    assert not torch.is_inference_mode_enabled()
    assert model.training


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_tqdm(name: str, *args: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(RuntimeError, match="progress=True needs tqdm"):
        build_prior("plain").sample((2, 2), 1, progress=True)


def test_float32_settings_come_back() -> None:
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        build_prior("plain").sample((2, 2), 1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (0, 2)}, "shape must be two positive ints"),
        ({"shape": (2,)}, "shape must be two positive ints"),
        ({"n": -1}, "n must be an int, at least 0; got -1"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0"),
        ({"top_k": 0}, r"top_k must be an int in 1 … num_codes=9.*got 0"),
        ({"top_k": 10}, r"top_k must be an int in 1 … num_codes=9.*got 10"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\].*got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\].*got 1\.5"),
        ({"method": "quick"}, "method must be one of .*got 'quick'"),
        ({"first_sample": -1}, "first_sample must be an int, at least 0"),
        ({"given": torch.zeros(3, 3).long()}, r"given must be \(2, 2\) or \(1, 2, 2\)"),
        ({"given": torch.full((2, 2), 9)}, "given must hold codes in 0 … 8"),
        ({"given": torch.full((2, 2), -2)}, "given must hold codes in 0 … 8"),
        ({"class_labels": 0}, "class_labels must be None"),
        ({"condition": torch.zeros(1, 1, 2, 2)}, "condition must be given exactly when"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    arguments = {"shape": (2, 2), "n": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        build_prior("plain").sample(**arguments)


def test_refusals_of_types() -> None:
    with pytest.raises(TypeError, match="seed must be an int or None; got float"):
        build_prior("plain").sample((2, 2), 1, seed=1.0)
    with pytest.raises(TypeError, match=r"given must be int64 codes.*got torch\.float32"):
        build_prior("plain").sample((2, 2), 1, given=torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["plain", "kernel 5", "dilations", "condition", "everything"])
def test_doubt_is_settled_from_what_a_code_can_depend_on(name: str) -> None:
    """Logits of a part of the map are those of the whole, at every position of a large map."""
    model, shape = build_prior(name).double().eval(), (17, 19)
    told = conditioning_of(name, N, shape)
    conditioning = sampling.Conditioning(told.get("class_labels"), told.get("condition"))
    codes = torch.randint(0, K, (N, *shape))
    request = sampling.make_request(shape, N, num_codes=K, device=codes.device, seed=0)
    settler = Settler(model, conditioning, request)
    sample = torch.tensor([1])
    with torch.no_grad():
        whole = settler.canonical_logits(codes[sample], sample)
        for row, column in ((0, 0), (3, 18), (16, 0), (16, 18), (9, 9)):
            seen = codes[sample].clone()
            seen.flatten(1)[:, row * shape[1] + column :] = -1
            got = settler._logits_at(seen, conditioning.pick(sample), row, column)
            # float64: sums of at most 16·36 terms in another order, through five layers
            torch.testing.assert_close(got, whole[:, :, row, column], rtol=0, atol=1e-10)
