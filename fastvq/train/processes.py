"""What Accelerate does not find out by itself about the processes of a launch."""

from __future__ import annotations

import os

import torch


def several_on_cpus() -> bool:
    """Whether a launcher (`torchrun`) started several processes where there is no GPU.

    Accelerate takes such processes for independent runs unless it is told to use CPUs.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
