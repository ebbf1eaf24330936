"""A training step of a whole VQ-VAE or VQ-VAE-2: forward, backward, Adam, codes updated.

One model, three quantizers in it: ours, vector-quantize-pytorch's, and the one-hot quantizer that
tutorials carry. The convolutions are the same and are most of the step, so the ratios say what a
user gains in all, not what the quantizer gains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.suites import Context, Prepared, Work, WrongResult
from fastvq.models import VQVAE, VQVAE2
from fastvq.nn.codebook import Codebook, CodebookOutput
from fastvq.reference import nearest_code as reference

_MODELS = {"vqvae": VQVAE, "vqvae2": VQVAE2}
CASES = {
    "cpu": [
        {"model": model, "B": 16, "side": 64, "width": 64, "K": k, "D": 64}
        for model, k in (("vqvae", 512), ("vqvae", 8192), ("vqvae2", 512))
    ],
    "cuda": [
        {"model": model, "B": 64, "side": 256, "width": 128, "K": k, "D": 64}
        for model, k in (("vqvae", 512), ("vqvae", 8192), ("vqvae2", 512))
    ],
}
QUICK_CASES = [{"model": "vqvae", "B": 4, "side": 32, "width": 16, "K": 256, "D": 32}]
# Share of vectors that may get another code from a float32 search; more is another function.
_MOST_MISSES = 0.05
_DECAY = 0.99

Step = Callable[[], tuple[Tensor, list[Tensor]]]


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    generator = torch.Generator().manual_seed(1)
    shape = (case["B"], 3, case["side"], case["side"])
    pictures = torch.rand(shape, generator=generator).to(context.device)
    ours = _model(case).to(context.device).train()
    _place_codes(ours, pictures)
    loss, codes = _checked_step(copy.deepcopy(ours), pictures)
    prepared = Prepared(_work(ours, pictures))
    prepared.candidates["fastvq.Codebook"] = _step(copy.deepcopy(ours), pictures)
    prepared.notes["fastvq.Codebook"] = "codes exact"

    def rival(name: str, make: Callable[[Codebook], nn.Module]) -> Step:
        model = _with_quantizer(ours, make)
        got, chosen = _step(copy.deepcopy(model), pictures)()
        misses = sum(int((a.flatten() != b.flatten()).sum()) for a, b in zip(codes, chosen))
        if misses > _MOST_MISSES * sum(level.numel() for level in codes):
            raise RuntimeError(f"{misses} vectors chose other codes")
        torch.testing.assert_close(got, loss, rtol=1e-3, atol=1e-4)
        prepared.notes[name] = f"{misses} codes not exact" if misses else "codes exact"
        return _step(model, pictures)

    for name, make in (
        ("vector-quantize-pytorch", _Lucidrains),
        ("one-hot quantizer", _OneHot),
        ("one-hot quantizer, compiled", lambda codebook: _OneHot(codebook, compiled=True)),
    ):
        prepared.rival(name, lambda name=name, make=make: rival(name, make))
    return prepared


def _model(case: dict[str, Any]) -> VQVAE2:
    """The same weights on every machine."""
    torch.manual_seed(0)
    arguments = {"level_dropout": 0.0} if case["model"] == "vqvae2" else {}
    return _MODELS[case["model"]](
        hidden_channels=case["width"],
        num_codes=case["K"],
        code_dim=case["D"],
        decay=_DECAY,
        kmeans_init=False,
        revive_below=0.0,
        **arguments,
    )


def _place_codes(model: VQVAE2, pictures: Tensor) -> None:
    """Codes at random vectors of the batch, so that many of them are chosen."""
    for codebook, rows in _codebook_inputs(model, pictures):
        chosen = torch.randint(len(rows), (codebook.num_codes,), generator=_generator())
        noise = torch.randn(codebook.num_codes, codebook.dim, generator=_generator())
        spread = 0.1 * rows.std() * noise.to(rows.device)
        codebook.embed.data[0] = rows[chosen.to(rows.device)] + spread
        codebook.embed_avg.data.copy_(codebook.embed)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _codebook_inputs(model: VQVAE2, pictures: Tensor) -> list[tuple[Codebook, Tensor]]:
    """Each codebook with the rows that it is given in a forward pass that changes nothing."""
    found: list[tuple[Codebook, Tensor]] = []
    hooks = [
        codebook.register_forward_pre_hook(
            lambda module, arguments: found.append((module, arguments[0].detach()))
        )
        for codebook in model.codebooks
    ]
    model.encode(pictures)
    for hook in hooks:
        hook.remove()
    return found


def _checked_step(model: VQVAE2, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and codes of a step of ours, the codes being those of the reference."""
    wanted = [
        reference.nearest_code(rows, codebook.embed[0])[0]
        for codebook, rows in _codebook_inputs(model, pictures)
    ]
    loss, codes = _step(model, pictures)()
    if not all(torch.equal(a, b.flatten()) for a, b in zip(wanted, codes)):
        raise WrongResult("fastvq's codes are not exact: no time is reported")
    return loss, codes


def _step(model: VQVAE2, pictures: Tensor) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> tuple[Tensor, list[Tensor]]:
        out = model(pictures)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        return out.loss.detach(), out.codes

    return step


def _work(model: VQVAE2, pictures: Tensor) -> Work:
    """Convolutions as PyTorch counts them and one product of vectors and codes per level.

    Pictures in and out, weights read twice, their gradients and Adam's state read and written.
    """
    searched = sum(
        2.0 * len(rows) * codebook.num_codes * codebook.dim
        for codebook, rows in _codebook_inputs(model, pictures)
    )
    trained = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter:
        trained(pictures).loss.backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Work(counter.get_total_flops() + searched, 4.0 * (2 * pictures.numel() + 9 * weights))


def _with_quantizer(model: VQVAE2, make: Callable[[Codebook], nn.Module]) -> VQVAE2:
    replaced = copy.deepcopy(model)
    replaced.codebooks = nn.ModuleList(make(codebook) for codebook in replaced.codebooks)
    return replaced.to(next(model.parameters()).device).train()


def _output(quantized: Tensor, indices: Tensor, commitment: Tensor) -> CodebookOutput:
    """What the model reads; perplexity and usage, which only ours reports, cost others nothing."""
    zero = commitment.new_zeros(())
    return CodebookOutput(quantized, indices, commitment, zero, zero, zero)


class _Lucidrains(nn.Module):
    """vector-quantize-pytorch's module in the place of a `Codebook`."""

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.quantize = VectorQuantize(codebook.dim, codebook.num_codes, decay=_DECAY)
        self.quantize._codebook.embed.data.copy_(codebook.embed)
        self.quantize._codebook.embed_avg.data.copy_(codebook.embed_avg)

    def forward(self, x: Tensor, freeze: bool = False) -> CodebookOutput:
        quantized, indices, commitment = self.quantize(x[None])
        return _output(quantized[0], indices[0], commitment.sum())


class _OneHot(nn.Module):
    """Expanded distances, argmin, a one-hot matrix for the look-up and for the averages."""

    def __init__(self, codebook: Codebook, compiled: bool = False) -> None:
        super().__init__()
        self.register_buffer("embed", codebook.embed[0].clone())
        self.register_buffer("sums", codebook.embed_avg[0].clone())
        self.register_buffer("counts", torch.ones(codebook.num_codes))
        self._eps = codebook.eps
        self._run = torch.compile(_one_hot, dynamic=False) if compiled else _one_hot

    def forward(self, x: Tensor, freeze: bool = False) -> CodebookOutput:
        quantized, indices, commitment, counts, sums = self._run(x, self.embed)
        self.counts.lerp_(counts, 1 - _DECAY)
        self.sums.lerp_(sums, 1 - _DECAY)
        total = self.counts.sum()
        smoothed = (self.counts + self._eps) / (total + len(counts) * self._eps) * total
        self.embed.copy_(self.sums / smoothed[:, None])
        return _output(quantized, indices, commitment)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneHot:
        twin = _OneHot.__new__(_OneHot)
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        for name, buffer in self.named_buffers():
            twin.register_buffer(name, buffer.clone())
        twin._eps, twin._run = self._eps, self._run
        return twin


def _one_hot(x: Tensor, embed: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        distances = (x**2).sum(1, keepdim=True) - 2 * x @ embed.T + (embed**2).sum(1)
        indices = distances.argmin(dim=1)
        chosen = F.one_hot(indices, len(embed)).to(x.dtype)
        counts, sums = chosen.sum(dim=0), chosen.T @ x
        q = chosen @ embed
    commitment = F.mse_loss(x, q)
    return x + (q - x).detach(), indices, commitment, counts, sums
