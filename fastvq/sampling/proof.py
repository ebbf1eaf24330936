"""Proving whole maps: is every code the canonical one, and what to do where one is not.

The canonical logits of all positions of a map come from one float64 forward of its codes (`draw`
says what canonical means). Up to the first code that is not the canonical draw from them, the map
is proven; that code is put right, the ones after it are drawn again, and so on until none is wrong.

It serves two ends. An executor that does not stop at doubts (`gpu_rows`) has the maps that hold
any proven. And `verify` has all maps proven, whatever drew them: their codes then rest on no
tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.sampling.draw import exact_draw
from fastvq.sampling.noise import gumbel_noise
from fastvq.sampling.request import Request

# Draws the unknown codes (−1) of maps in place, given which of the request's samples they are;
# returns which draws it left in doubt, (n, H, W) bool.
DrawMaps = Callable[[Tensor, Tensor], Tensor]
# Canonical logits (1, K, H, W) of one sample's codes (1, H, W), given its index (1,).
CanonicalLogits = Callable[[Tensor, Tensor], Tensor]


def draw_and_prove(
    draw_maps: DrawMaps, canonical_logits: CanonicalLogits, blank: Tensor, request: Request
) -> Tensor:
    """Draw what a request asks for; (n, H, W) int64.

    Args:
        blank: (n, H, W) int64, the given codes, −1 elsewhere.
    Raises:
        RuntimeError: canonical logits are not finite.
    """
    codes = blank.clone()
    pending = torch.arange(len(codes), device=codes.device)
    while len(pending):
        drawn = codes[pending]
        unknown = drawn < 0
        doubts = draw_maps(drawn, pending)
        codes[pending] = drawn
        suspects = (unknown if request.verify else doubts).flatten(1).any(dim=1)
        again = []
        for place in suspects.nonzero()[:, 0].tolist():
            sample = pending[place : place + 1]
            found = _first_mistake(canonical_logits, codes[sample], unknown[place], sample, request)
            if found is None:
                continue
            position, code = found
            if not (request.verify or doubts[place].flatten()[position]):
                warnings.warn(
                    "sample: float32 logits differ from float64 by more than the tolerance; codes "
                    "may depend on the method. verify=True proves every code.",
                    stacklevel=2,
                )
            proven = codes[sample].flatten()[:position]
            rest = blank[sample].flatten()[position + 1 :]
            codes[sample] = torch.cat([proven, code, rest]).view_as(codes[sample])
            again.append(sample)
        pending = torch.cat(again) if again else pending[:0]
    return codes


def _first_mistake(
    canonical_logits: CanonicalLogits,
    codes: Tensor,
    unknown: Tensor,
    sample: Tensor,
    request: Request,
) -> tuple[int, Tensor] | None:
    """Raster position of the first drawn code that is not the canonical one, and that one, (1,).

    Args:
        codes: (1, H, W), complete.
        unknown: (H, W) bool, which of them were drawn.
    """
    positions = unknown.flatten().nonzero()[:, 0]
    logits = canonical_logits(codes, sample).flatten(2)[0, :, positions].T
    noise = None
    if request.rule.temperature != 0:
        key = request.samples[sample]
        noise = gumbel_noise(request.seed, key, request.level, positions, request.num_codes)[:, 0]
    canonical = exact_draw(logits, noise, request.rule)
    finite = logits.isfinite().all(dim=1)
    wrong = ((canonical != codes.flatten()[positions]) | ~finite).nonzero()[:, 0]
    if len(wrong) == 0:
        return None
    first = int(wrong[0])
    position = int(positions[first])
    if not finite[first]:
        raise not_finite(*divmod(position, request.width))
    return position, canonical[first : first + 1]


def not_finite(row: int, column: int) -> RuntimeError:
    """The error of a model whose logits hold NaN or Inf."""
    return RuntimeError(
        f"sample: the model's logits at row {row}, column {column} must be finite; got NaN or "
        "Inf. Look for NaN in its weights or condition."
    )
