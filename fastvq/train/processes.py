"""Processes and devices: what Accelerate does not find out by itself, or is not asked."""

from __future__ import annotations

import os

import torch


def several_on_cpus() -> bool:
    """Whether a launcher (`torchrun`) started several processes where there is no GPU.

    Accelerate takes such processes for independent runs unless it is told to use CPUs.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def device_of(device: str | None) -> str:
    """The device asked for, or CUDA where there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device '{device}' cannot be used: {reason}") from error
    return device
