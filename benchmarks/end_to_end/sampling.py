"""Drawing maps of codes from a prior: cached, by whole forwards, and cached in eager PyTorch.

One prior with random weights, its logits scaled to those of a trained one. The codes are proven
before they are timed: every code of the first samples is compared with the canonical draw, by one
float64 forward of each map.

`method="full"` takes minutes to hours, so a few of its steps are timed and multiplied; the eager
rival likewise by rows, which is to its favour where attention grows with the row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.end_to_end.eager_cached import EagerCached
from benchmarks.isolated import TimesItself
from benchmarks.suites import Context, Prepared, Work, WrongResult
from fastvq.models import PixelCNN
from fastvq.sampling import Conditioning, eval_copy
from fastvq.sampling.full import FullExecutor
from fastvq.sampling.plan import GatedLayerPlan

# Beside num_codes: what a small published prior has; width, depth and kernel of the default
# PixelSNAIL priors with attention (top) and without it (bottom); a bottom prior for CPUs.
_PRIORS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_channels": 8, "num_layers": 2},
    "small": {"hidden_channels": 64, "num_layers": 15},
    "attentive": {
        "hidden_channels": 256,
        "num_layers": 20,
        "kernel_size": 5,
        "attention_every": 5,
    },
    "bottom": {"hidden_channels": 128, "num_layers": 15, "condition_channels": 64},
    "wide bottom": {
        "hidden_channels": 256,
        "num_layers": 20,
        "kernel_size": 5,
        "condition_channels": 256,
    },
}
CASES = {
    "cpu": [
        {"prior": "small", "side": 32, "K": 512, "B": 1},
        {"prior": "small", "side": 32, "K": 512, "B": 16},
        {"prior": "attentive", "side": 32, "K": 512, "B": 1},
        {"prior": "bottom", "side": 64, "K": 512, "B": 1},
    ],
    "cuda": [
        {"prior": name, "side": side, "K": 512, "B": batch, "dtype": dtype}
        for name, side in (("attentive", 32), ("wide bottom", 64))
        for batch, dtype in ((1, "float32"), (64, "float32"), (64, "bfloat16"))
    ],
}
QUICK_CASES = [{"prior": "tiny", "side": 4, "K": 16, "B": 2}]
_PROVEN = 2  # samples whose every code is proven
_FULL_STEPS = 2
_EAGER_ROWS = 2
_LOGITS = 2.5  # standard deviation


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    prior = _prior(case, context.device)
    side, batch = case["side"], case["B"]
    shape, told = (side, side), _conditioning(prior, case, context.device)

    def cached() -> Tensor:
        return prior.sample(shape, batch, seed=0, **told)

    prepared = Prepared(_work(prior, case))
    codes = cached()
    few = {name: value[:_PROVEN] for name, value in told.items()}
    proven = prior.sample(shape, min(batch, _PROVEN), seed=0, verify=True, **few)
    if not torch.equal(codes[:_PROVEN], proven):
        raise WrongResult("fastvq's codes are not the canonical ones: no time is reported")
    prepared.candidates['fastvq, method="cached"'] = cached
    prepared.notes['fastvq, method="cached"'] = f"every code of {len(proven)} maps proven"
    full = FullExecutor(
        eval_copy(prior, torch.float32), Conditioning(None, _float(told.get("condition")))
    )
    middle = side // 2

    def some_steps() -> Tensor:
        with torch.inference_mode():
            for column in range(_FULL_STEPS):
                logits = full.step(codes, middle, column, True)
        assert logits is not None
        return logits.argmax(dim=1)

    prepared.candidates['fastvq, method="full"'] = _Extrapolated(
        some_steps, side * side / _FULL_STEPS, context.device
    )
    prepared.notes['fastvq, method="full"'] = f"{_FULL_STEPS} of {side * side} steps, multiplied"

    def eager() -> Callable[[], object]:
        rival = EagerCached(eval_copy(prior, torch.float32), _float(told.get("condition")))
        rows = min(_EAGER_ROWS, side)
        drawn = rival.draw(shape, batch, rows, seed=0, device=context.device)
        differing = int((drawn != codes[:, :rows]).sum())
        if differing > drawn.numel() // 20:
            raise RuntimeError(f"{differing} of {drawn.numel()} codes differ")
        prepared.notes["eager PyTorch, cached"] = f"{rows} of {side} rows, multiplied; " + (
            f"{differing} codes differ" if differing else "same codes"
        )
        return _Extrapolated(
            lambda: rival.draw(shape, batch, rows, seed=0, device=context.device),
            side / rows,
            context.device,
        )

    prepared.rival("eager PyTorch, cached", eager)
    return prepared


def _float(condition: Tensor | None) -> Tensor | None:
    return None if condition is None else condition.float()


def _prior(case: dict[str, Any], device: str) -> PixelCNN:
    """The same weights on every machine."""
    torch.manual_seed(0)
    prior = PixelCNN(case["K"], **_PRIORS[case["prior"]]).eval().requires_grad_(False)
    codes = torch.randint(case["K"], (1, 4, 4))
    told = _conditioning(prior, {**case, "side": 4, "B": 1}, "cpu")
    scale = _LOGITS / prior(codes, **told).std()
    prior.head[3].weight *= scale
    prior.head[3].bias *= scale
    return prior.to(device, getattr(torch, case.get("dtype", "float32")))


def _conditioning(prior: PixelCNN, case: dict[str, Any], device: str) -> dict[str, Tensor]:
    if prior.condition_channels is None:
        return {}
    shape = (case["B"], prior.condition_channels, case["side"], case["side"])
    condition = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return {"condition": condition.to(device, prior.embedding.weight.dtype)}


def _work(prior: PixelCNN, case: dict[str, Any]) -> Work:
    """Every live weight once per code and sample; of memory, what a code's own row must read."""
    plan = prior._plan()
    hot = cold = 0
    for layer in plan.layers:
        if isinstance(layer, GatedLayerPlan):
            hot += layer.horizontal_weight.numel() + layer.out_weight.numel()
            cold += layer.vertical_weight.numel() + layer.link_weight.numel()
        else:
            hot += layer.weight.numel() + layer.out_weight.numel()
    hot += plan.head.hidden_weight.numel() + plan.head.logit_weight.numel()
    positions, size = case["side"] ** 2, prior.embedding.weight.element_size()
    read = size * (positions * hot + case["side"] * cold)
    return Work(2.0 * case["B"] * positions * (hot + cold), float(read))


class _Extrapolated(TimesItself):
    """A part of the work, its time multiplied to the whole's."""

    def __init__(self, part: Callable[[], Tensor], times: float, device: str) -> None:
        self._part, self._times, self._device = part, times, device

    def __call__(self) -> None:
        self._part()

    def result(self) -> np.ndarray:
        found: np.ndarray = self._part().cpu().numpy()
        return found

    def time_ms(self, cold: bool = False) -> float:
        """Weights stay warm in either method from one step to the next: `cold` has no meaning."""
        start = time.perf_counter()
        self._part()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 * self._times

    def peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        pass
