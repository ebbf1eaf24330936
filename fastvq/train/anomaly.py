"""How odd a model finds an item: the surprise of its codes, the error of its reconstruction.

`AnomalyModel` measures items, `Standardisation` joins its two measures to one score. The threshold
is in false_alarms.py, the command that puts them to use in detection.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastvq.train.false_alarms import Scores
from fastvq.train.run_folder import Run, load_run

SCORES = ("combined", "likelihood", "reconstruction")
_GREY_STEP = 1.0 / 255.0  # the contrast below which a picture counts as flat


class Measures(NamedTuple):
    """What is measured of B items; positions *S are an item's own, (H, W) of a picture."""

    level_nats: Tensor  # (B, L) −log p of each level's codes, top first; (B, 0) without a prior
    mse: Tensor  # (B,) mean squared error of the reconstruction, of values in 0…1
    relative_error: Tensor  # (B,) that error over the item's own variance
    surprise: Tensor | None  # (B, *S) nats per position, as `AnomalyModel` says
    error: Tensor  # (B, *S) squared error, mean over channels and over each finest code's cell

    @property
    def nats(self) -> Tensor:
        """(B,) −log p of all codes together."""
        return self.level_nats.sum(dim=1)


class AnomalyModel:
    """The models of a run, as a judge of items.

        surprise:        −log p(z(x)) = Σ_level Σ_i −log p(z[level, i] | codes before it)
        relative error:  ‖x − x̂‖² / ‖x − mean(x)‖²,   x̂ decoded from the top levels of z(x)

    in nats, and as the share of an item's own variance that its reconstruction leaves unexplained,
    so that neither contrast, loudness nor the amount of ink decides. Under a class-conditional
    prior p is the mixture of its classes, all equally likely.

    The map of surprise lays each code's −log p evenly over the positions that the code covers, and
    adds the levels: summed over the positions it is −log p(z(x)) again.

    Args:
        run: of a "prior", or of a "vqvae", "vqvae2" or "vae", which has no likelihood of codes.
        levels: levels of codes to reconstruct from, top first; None: all. Few of them hold an
            item to what the model has learnt of the whole, since fine codes can draw anything.
        device: for both models.
    Raises:
        ValueError: `levels` is out of range, or the run has no model yet.
    """

    def __init__(self, run: Run, *, levels: int | None = None, device: str = "cpu") -> None:
        self.prior: Any = run.model(device) if run.kind == "prior" else None
        self.model: Any = run.stage1_model(device) if run.kind == "prior" else run.model(device)
        self.stage1 = load_run(run.stage1) if run.stage1 is not None else run
        self.device = device
        available = getattr(self.model, "levels", 1)
        if levels is not None and not 1 <= levels <= available:
            raise ValueError(
                f"detect: levels must be in 1 … {available}, those of run '{self.stage1.path}'; "
                f"got {levels}."
            )
        self.levels = available if levels is None else levels

    @torch.no_grad()
    def measure(self, items: Tensor) -> Measures:
        """Measure items (B, C, *S), float as the model takes them.

        Raises:
            ValueError: the encoder's output is not finite for some item.
        """
        items = items.to(self.device)
        codes, decoded = self._codes_and_reconstruction(items)
        error = (decoded - items).square().mean(dim=1)
        mse = error.flatten(start_dim=1).mean(dim=1)
        centred = items - items.flatten(start_dim=1).mean(dim=1).view(-1, *[1] * (items.dim() - 1))
        variance = centred.square().flatten(start_dim=1).mean(dim=1).clamp(min=_GREY_STEP**2)
        level_nats, surprise = items.new_zeros(len(items), 0), None
        if self.prior is not None:
            maps = code_nats(self.prior, codes)
            level_nats = torch.stack([one.flatten(start_dim=1).sum(dim=1) for one in maps], dim=1)
            surprise = self._surprise(maps, items.shape[2:])
        cell = getattr(self.model, "downsample", 1)
        return Measures(level_nats, mse, mse / variance, surprise, cell_means(error, cell))

    def _surprise(self, maps: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """(B, *shape) nats per position; what codes say of positions past the end is cut off."""
        total = torch.zeros(len(maps[0]), *shape, device=maps[0].device)
        for below, code_map in enumerate(reversed(maps)):
            laid = spread(code_map, self.model.downsample << below)
            for axis, size in enumerate(shape, start=1):
                laid = laid.narrow(axis, 0, size)
            total += laid
        return total

    def _codes_and_reconstruction(self, items: Tensor) -> tuple[list[Tensor], Tensor]:
        """Codes (none of a VAE), and x̂ in the range of the items: 0…1, of sounds −1…1."""
        if not hasattr(self.model, "decode_codes"):
            return [], self.model.decode(self.model.encode(items).mean).float()
        codes = self.model.encode(items)
        decoded = self.model.decode_codes(codes, levels=self.levels).float()
        decoded = decoded[..., : items.shape[-1]]  # of a padded sound
        return codes, decoded.clamp(-1.0 if items.dim() == 3 else 0.0, 1.0)


def code_nats(prior: nn.Module, codes: Sequence[Tensor]) -> list[Tensor]:
    """−log p of each code given all before it, nats: one map per level, shaped as `codes`.

    Of a class-conditional prior with C classes: under p = Σ_c p(· | c) / C, by the chain rule,

        p(z_i | z_<i) = Σ_c p(z_≤i | c) / Σ_c p(z_<i | c)

    with z in raster order, top level first.
    """
    log_prob: Any = prior.code_log_prob
    classes: int | None = prior.config["num_classes"]  # type: ignore[index, assignment]
    if classes is None:
        return [-one for one in log_prob(codes)]
    batch, device = len(codes[0]), codes[0].device
    running = []
    for label in range(classes):
        maps = log_prob(codes, torch.full((batch,), label, device=device))
        terms = torch.cat([one.flatten(start_dim=1) for one in maps], dim=1).double()
        running.append(terms.cumsum(dim=1))
    joint = torch.logsumexp(torch.stack(running), dim=0) - math.log(classes)
    nats = -torch.diff(joint, dim=1, prepend=joint.new_zeros(batch, 1)).float()
    sizes = [one[0].numel() for one in codes]
    return [part.view(one.shape) for part, one in zip(nats.split(sizes, dim=1), codes)]


def spread(code_map: Tensor, cell: int) -> Tensor:
    """(B, *s) per code → (B, *S) per position, S = s · cell: each value divided over its cell.

    A code covers `cell` positions along every axis, and its value is shared among them evenly, so
    that both maps have the same sum.
    """
    for axis in range(1, code_map.dim()):
        code_map = code_map.repeat_interleave(cell, dim=axis) / cell
    return code_map


def cell_means(values: Tensor, cell: int) -> Tensor:
    """(B, *S): every value replaced by the mean over its cell, `cell` positions along each side.

    Sides that are no multiple of `cell` have smaller cells at their end.
    """
    for axis in range(1, values.dim()):
        size = values.shape[axis]
        owner = torch.arange(size, device=values.device) // cell
        sums = values.new_zeros(*values.shape[:axis], int(owner[-1]) + 1, *values.shape[axis + 1 :])
        sums.index_add_(axis, owner, values)
        counts = torch.bincount(owner).view(-1, *[1] * (values.dim() - 1 - axis))
        values = (sums / counts).index_select(axis, owner)
    return values


class Standardisation(NamedTuple):
    """Mean and standard deviation of both measures on held-in items, and the score they make.

        combined = (surprise − mean) / deviation + (error − mean) / deviation

    Each term ranks items as its measure does; the sum weighs them by how far they stray on normal
    items. It serves for the totals of items and for the positions of maps alike.
    """

    surprise: tuple[float, float]
    error: tuple[float, float]

    @classmethod
    def fit(cls, surprise: Scores, error: Scores) -> Standardisation:
        """From the (n,) values of held-in items, or positions of maps.

        Raises:
            ValueError: a measure does not vary at all.
        """
        found = []
        for name, values in (("likelihood", surprise), ("reconstruction error", error)):
            mean, deviation = float(np.mean(values)), float(np.std(values))
            if not deviation > 0.0:
                raise ValueError(
                    f"detect: the {name} of held-in items must vary, for the two to be weighed; "
                    f"all {len(values)} have {mean:g}. Choose one of the two by --score."
                )
            found.append((mean, deviation))
        return cls(*found)

    def combined(self, surprise: Scores, error: Scores) -> Scores:
        """The sum of the standardised measures, of any shape."""
        return _standardised(surprise, *self.surprise) + _standardised(error, *self.error)


def _standardised(values: Scores, mean: float, deviation: float) -> Scores:
    standardised: Scores = (values - mean) / deviation
    return standardised
