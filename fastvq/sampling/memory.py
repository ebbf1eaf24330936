"""What a cached sampling request needs in memory, known before it starts."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvq.sampling.plan import AttentionPlan, GatedLayerPlan, PriorPlan
from fastvq.sampling.request import Request

_MEMINFO = Path("/proc/meminfo")


def bytes_per_sample(plan: PriorPlan, height: int, width: int) -> int:
    """Bytes that the buffers of cached sampling take for each map of height × width codes.

    A sequence is a map one row high.

    Per gated layer the ring, the row terms and the horizontal inputs; per attention layer keys and
    values; once, the widest layer's gathered taps with their products, the logits, scores and
    noise of a code, and the map itself. The weights are not counted: the prior holds them.
    """
    num_codes, channels = plan.embedding.shape
    numbers = transient = 0
    for layer in plan.layers:
        if isinstance(layer, AttentionPlan):
            numbers += 2 * height * width * channels
            continue
        reach = layer.reach
        numbers += 2 * width * channels + (reach + width) * channels
        if not isinstance(layer, GatedLayerPlan):
            transient = max(transient, width * 2 * channels)
            continue
        numbers += (reach + 1) * (width + 2 * reach) * channels
        taps = layer.rows * layer.kernel_size * channels
        transient = max(transient, width * (taps + 8 * channels))
    return (
        (numbers + transient) * plan.embedding.element_size() + num_codes * 40 + height * width * 8
    )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device as its system tells it; None where it does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_memory(plan: PriorPlan, request: Request) -> None:
    """Refuse a request that cannot fit, before anything is drawn.

    Raises:
        RuntimeError: it needs more than is free; the message says how many samples would fit.
    """
    free = available_bytes(request.device)
    each = bytes_per_sample(plan, request.height, request.width)
    if free is None or each * request.num_samples <= free:
        return
    raise RuntimeError(
        f"sample: n must be at most {free // each} for {request.what} to fit in the "
        f"{free / 2**30:.1f} GiB that are free; got {request.num_samples}, which needs "
        f" {each * request.num_samples / 2**30:.1f} GiB. Draw them in parts with first_sample: the "
        "codes are the same."
    )
