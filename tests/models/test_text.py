"""TextVAE and TextVQVAE: likelihoods, what the loss counts, drawing, saving, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq.models.text import END, TextVAE, TextVQVAE, live_symbols
from fastvq.train.data.text import lines_of, symbols_of

SMALL: dict[str, Any] = {"length": 16, "hidden_channels": 8, "downsample": 4, "num_layers": 2}
LINES = symbols_of([b"hello", b"", b"a longer line", b"x" * 15], 16)


def _build(cls: type[Any], **more: Any) -> Any:
    torch.manual_seed(0)
    return cls(**SMALL, **more)


def test_live_symbols_end_with_the_first_newline() -> None:
    assert live_symbols(LINES).sum(1).tolist() == [6, 1, 14, 16]


def test_the_loss_of_a_vae_is_the_bound_with_free_nats() -> None:
    model = _build(TextVAE, latent_dim=3, free_nats=0.1).double()
    torch.manual_seed(1)
    out = model(LINES)
    posterior = model.encode(LINES)
    torch.manual_seed(1)
    log_prob = model.line_log_prob(LINES, posterior.sample())
    each = 0.5 * (posterior.mean**2 + posterior.log_variance.exp() - 1 - posterior.log_variance)
    expected = -log_prob.mean() + each.mean(0).clamp(min=0.1).sum()
    # float64: sums of fewer than 100 terms below 10
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.kl, each.sum(1), rtol=0, atol=1e-10)
    torch.manual_seed(1)
    torch.testing.assert_close(model.elbo(LINES), log_prob - each.sum(1), rtol=0, atol=1e-10)


def test_free_nats_cost_no_gradient() -> None:
    """With all of it free, the posterior's spread is pulled by the reconstruction alone."""
    model = _build(TextVAE, latent_dim=3, free_nats=1e6)
    out = model(LINES)
    out.loss.backward()
    with_free = model.to_latent.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(2)
    first = model(LINES)
    first.reconstruction_loss.mean().backward()
    alone = model.to_latent.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(2)
    model(LINES).loss.backward()
    torch.testing.assert_close(model.to_latent.weight.grad, alone)
    assert with_free.abs().sum() > 0


@pytest.mark.parametrize("cls", [TextVAE, TextVQVAE])
def test_what_follows_the_end_of_a_line_costs_nothing(cls: type[Any]) -> None:
    """The first two symbols and the end decide the likelihood of a two-symbol line."""
    model = _build(cls).double().eval()
    x = symbols_of([b"ab"], 16)
    junk = x.clone()
    junk[:, 3:] = ord("z")
    features = model._spread(torch.randn(1, model.latent_dim).double()) if cls is TextVAE else None
    if features is None:
        features = model._vectors(model.encode(x))
    with torch.no_grad():
        own = model._negative_log_likelihood(x, features)
        assert torch.equal(model._negative_log_likelihood(junk, features), own)
        logits = model.decoder(x, condition=model.condition(features))[0]
    spelled = logits.log_softmax(0)[x[0, :3], torch.arange(3)].sum()
    torch.testing.assert_close(own[0], -spelled, rtol=0, atol=1e-12)


def test_a_code_reaches_its_symbols_and_a_latent_all() -> None:
    quantized = _build(TextVQVAE, num_codes=8).eval()
    with torch.no_grad():
        quantized.codebook.embed.normal_()
        base = quantized.line_log_prob(LINES, [torch.zeros(4, 4).long()])
        other = torch.zeros(4, 4).long()
        other[:, 0] = 5
        assert (quantized.line_log_prob(LINES, [other]) != base).all()
        vae = _build(TextVAE).eval()
        z = torch.zeros(4, vae.latent_dim)
        assert (vae.line_log_prob(LINES, z) != vae.line_log_prob(LINES, z + 1)).all()


def test_training_lowers_the_loss_and_the_model_is_kept(tmp_path: Path) -> None:
    model = _build(TextVQVAE, num_codes=8)
    x = symbols_of([b"good morning", b"and farewell"] * 2, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        losses.append(model(x).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    codes = model.encode(x[:2])
    drawn = model.decode_codes(codes)
    ended = (drawn == END).cumsum(dim=1) > 0
    assert (drawn[ended] == END).all()
    assert len(lines_of(drawn)) == 2
    model.save_pretrained(tmp_path)
    again = TextVQVAE.from_pretrained(tmp_path).eval()
    assert torch.equal(again.decode_codes(codes), drawn)


def test_drawing_depends_on_the_seed_alone() -> None:
    model = _build(TextVAE).eval()
    whole = model.sample(4, seed=3)
    assert torch.equal(whole, model.sample(4, seed=3))
    assert not torch.equal(whole, model.sample(4, seed=4))
    full = model.sample(4, seed=3, method="full")
    assert torch.equal(whole, full)
    assert math.prod(whole.shape) == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TextVAE(length=10), "length must be a multiple of downsample=8; got 10"),
        (lambda: TextVAE(downsample=3), "downsample must be 2, 4, 8"),
        (lambda: TextVAE(latent_dim=0), "latent_dim must be at least 1"),
        (lambda: TextVAE(hidden_channels=1), "hidden_channels must be at least 2"),
        (lambda: _build(TextVAE)(LINES[:, :8]), r"x must be int64 lines \(B, 16\)"),
        (lambda: _build(TextVQVAE).decode_codes([LINES]), r"codes must be \[int64 \(B, 4\)\]"),
        (lambda: symbols_of([b"a\nb"], 16), "fewer than 16 bytes and no newline"),
        (lambda: symbols_of([b"x" * 16], 16), "got 16 bytes"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
