"""Priors over sequences: what they see, and codes that no method, batch or stretch changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling.priors import MODELS as ALL_MODELS
from sampling.priors import RULES as ALL_RULES
from sampling.priors import K
from torch import Tensor

from fastvq.models import HierarchicalPrior
from fastvq.models.pixelcnn import PixelCNN
from fastvq.sampling import cpu_rows, sequence
from fastvq.sampling import draw as draw_module

N, T = 3, 13
MODELS = {name: ALL_MODELS[name] for name in ALL_MODELS if name not in ("deep", "kernel 7")}
RULES = {name: ALL_RULES[name] for name in ("temperature 1", "greedy", "all three")}
STREAMED = [name for name in MODELS if name not in ("attention", "everything")]


def _build(name: str, **more: Any) -> PixelCNN:
    torch.manual_seed(0)
    model = PixelCNN(K, 8, dimensions=1, **{**MODELS[name], **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def _told(name: str, n: int, length: int) -> dict[str, Tensor]:
    told = {}
    if "num_classes" in MODELS[name]:
        told["class_labels"] = torch.arange(n) % 4
    if "condition_channels" in MODELS[name]:
        told["condition"] = torch.randn(n, 5, length, generator=torch.Generator().manual_seed(1))
    return told


def _streamed(told: dict[str, Any]) -> dict[str, Any]:
    """The same with the condition as a function of the steps, zero beyond the map."""
    if "condition" not in told:
        return told
    condition = torch.nn.functional.pad(told["condition"], (0, 100))
    return {**told, "condition": lambda start, stop: condition[:, :, start:stop]}


def _take(stretches: Iterator[Tensor], length: int) -> Tensor:
    parts: list[Tensor] = []
    while sum(part.shape[1] for part in parts) < length:
        parts.append(next(stretches))
    return torch.cat(parts, dim=1)[:, :length]


@pytest.fixture(params=["cpp", "torch"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu_rows, "can_run", lambda plan: False)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_sees_exactly_the_earlier_codes_within_reach(name: str) -> None:
    model = _build(name).double().eval()
    embedded = torch.randn(1, 8, T).double().repeat(T, 1, 1).requires_grad_()
    told = {key: value[:1].expand(T, *value.shape[1:]) for key, value in _told(name, 1, T).items()}
    if "condition" in told:
        told["condition"] = told["condition"].double()
    logits = model.logits_from_embedding(embedded, **told)
    weights = torch.randn(K).double()
    torch.einsum("pkp,k->", logits, weights).backward()  # copy p contributes its logits at p
    seen = (embedded.grad != 0).any(dim=1)
    reach = model.receptive_field.columns
    expected = torch.ones(T, T, dtype=torch.bool).tril(-1)
    if reach is not None:
        expected &= torch.ones(T, T, dtype=torch.bool).triu(-reach)
        assert model.receptive_field.rows == 0
    if name == "dilations":  # within reach, not every code is on a path of taps
        assert not (seen & ~expected).any()
        assert seen.diagonal(-1).all()
    else:
        assert torch.equal(seen, expected)


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    torch.manual_seed(0)
    model = PixelCNN(3, 8, 3, attention_every=2, attention_heads=2, dimensions=1).double()
    sequences = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_prob = model.log_prob(sequences)
    assert model.code_log_prob(sequences).shape == (81, 4)
    # 81 float64 terms, each a product of four softmax values
    torch.testing.assert_close(log_prob.exp().sum().item(), 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_both_methods_give_the_same_codes(name: str, executor: str) -> None:
    model = _build(name)
    given = torch.randint(0, K, (N, T), generator=torch.Generator().manual_seed(2))
    given[:, 2::3] = -1
    patterns = itertools.cycle([None, given, given[0], given.masked_fill(given > 4, -1)])
    for (rule, options), known in zip(RULES.items(), patterns):
        arguments = {**options, **_told(name, N, T), "seed": 4, "given": known}
        cached = model.sample(T, N, **arguments)
        assert cached.shape == (N, T)
        assert torch.equal(cached, model.sample((T,), N, method="full", **arguments)), rule
        if known is not None:
            assert torch.equal(
                cached[(known >= 0).expand(N, T)], known.expand(N, T)[known.expand(N, T) >= 0]
            )


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_gives_what_sample_gives(name: str, executor: str) -> None:
    model = _build(name)
    told = _told(name, N, T)
    prefix = torch.randint(0, K, (N, 5), generator=torch.Generator().manual_seed(2))
    prefix[1, 3] = -1
    for (rule, options), stretch in zip(RULES.items(), (1, 4, 64)):
        known = None if rule == "greedy" else prefix
        given = None if known is None else torch.nn.functional.pad(known, (0, T - 5), value=-1)
        arguments: dict[str, Any] = {**options, "seed": 4}
        expected = model.sample(T, N, given=given, **told, **arguments)
        stretches = model.stream(N, given=known, stretch=stretch, **_streamed(told), **arguments)
        assert torch.equal(_take(stretches, T), expected), rule


def test_stretches_settle_their_doubts_from_the_steps_they_can_see(
    executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every draw in doubt the codes are the canonical ones still."""
    model = _build("dilations", num_classes=4, condition_channels=5)
    told = {**_told("classes", N, 40), **_told("condition", N, 40)}
    expected = model.sample(40, N, seed=1, **told)
    settled = []
    original = sequence.Settler.settle

    def counting(self: Any, codes: Tensor, *arguments: Any) -> Tensor:
        settled.append(codes.shape[2])
        return original(self, codes, *arguments)

    monkeypatch.setattr(sequence.Settler, "settle", counting)
    if executor == "torch":
        monkeypatch.setattr(draw_module, "TOLERANCE", 100.0)
    stretches = model.stream(N, seed=1, stretch=7, **_streamed(told))
    assert torch.equal(_take(stretches, 40), expected)
    if executor == "torch":
        reach = model.receptive_field.columns
        assert settled == [min(reach, position) + 1 for position in range(42)]


def test_streaming_takes_constant_memory() -> None:
    model = _build("dilations")
    plan = model._plan()
    request = model._request(4, N, **_REQUEST)
    prefix = torch.empty(N, 0, dtype=torch.int64)
    running = sequence._Stream(sequence.OneRow(model), plan, None, None, prefix, request)
    sizes = []
    with torch.inference_mode():
        for _ in range(12):
            running.draw_stretch()
            held = [running._seen]
            if running._rows is not None:
                held += [*running._rows._kept, *running._rows._inputs]
            sizes.append(sum(tensor.numel() for tensor in held))
    assert len(set(sizes)) == 1
    assert running._seen.shape == (N, model.receptive_field.columns)


_REQUEST: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "given": None,
    "seed": 0,
    "first_sample": 0,
    "level": 0,
    "progress": False,
}


def test_batches_and_first_sample_do_not_matter() -> None:
    model = _build("classes")
    labels = torch.arange(6) % 4
    whole = model.sample(T, 6, seed=0, class_labels=labels)
    halves = [
        model.sample(T, 3, seed=0, class_labels=labels[first : first + 3], first_sample=first)
        for first in (0, 3)
    ]
    assert torch.equal(torch.cat(halves), whole)
    stretches = model.stream(3, class_labels=labels[3:], seed=0, first_sample=3, stretch=5)
    assert torch.equal(_take(stretches, T), whole[3:])
    assert model.sample(T, 0, class_labels=labels[:0]).shape == (0, T)


def test_levels_of_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prior = HierarchicalPrior(
        [5, 6],
        [[4], [12]],
        hidden_channels=8,
        num_layers=2,
        condition_channels=6,
        conditioning_blocks=1,
        num_classes=3,
    )
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1.5)
    codes = prior.sample(3, class_labels=2, seed=0)
    full = prior.sample(3, class_labels=2, seed=0, method="full")
    assert [tuple(level.shape) for level in codes] == [(3, 4), (3, 12)]
    assert all(torch.equal(a, b) for a, b in zip(codes, full))
    labels = torch.full((3,), 2)
    prior.save_pretrained(tmp_path)
    again = HierarchicalPrior.from_pretrained(tmp_path)
    assert torch.equal(again.log_prob(codes, labels), prior.log_prob(codes, labels))
    other = [(codes[0] + 1) % 5, codes[1]]
    assert (prior.level_log_prob(other, labels) != prior.level_log_prob(codes, labels)).all()


def test_save_and_load(tmp_path: Path) -> None:
    model = _build("everything").eval()
    told = _told("everything", N, T)
    model.save_pretrained(tmp_path)
    loaded = PixelCNN.from_pretrained(tmp_path).eval()
    codes = torch.randint(0, K, (N, T))
    assert torch.equal(loaded(codes, **told), model(codes, **told))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 2, 3).long()), r"codes must be \(B, T\) with T at least 1"),
        (lambda m: m.sample((2, 3), 1), r"shape must be a positive int, T or \(T,\)"),
        (lambda m: m.sample(0, 1), r"shape must be a positive int.*got 0"),
        (lambda m: m.sample(4, 1, given=torch.zeros(1, 3).long()), r"given must be \(4,\) or"),
        (lambda m: m.sample(4, 1, condition=torch.zeros(1, 2, 4)), "condition must be given"),
        (lambda m: m.stream(1, stretch=0), "shape must be a positive int.*got 0"),
        (lambda m: m.stream(1, given=torch.full((3,), K)), "given must hold codes"),
        (lambda m: m.stream(1, condition=lambda start, stop: None), "condition must be given"),
        (lambda m: m.stream(1, class_labels=1), "class_labels must be None"),
        (lambda m: _build("attention").stream(1), "must be without attention"),
        (lambda m: PixelCNN(3).stream(1), "dimensions must be 1"),
        (lambda m: PixelCNN(3, dimensions=3), "PixelCNN: dimensions must be 1"),
        (lambda m: HierarchicalPrior(4, [[2], [2, 4]]), "shapes must be"),
        (lambda m: HierarchicalPrior(4, [[2], [3]]), "whole multiple"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(_build("plain"))


def test_a_condition_of_the_wrong_length_is_refused() -> None:
    model = _build("condition")
    with pytest.raises(ValueError, match=r"condition must be \(1, 5, 4\)"):
        model.stream(1, condition=lambda start, stop: torch.zeros(1, 5, 1), stretch=4)
