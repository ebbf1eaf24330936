"""Holding PyTorch's convolutions to results that are the same bits on every run.

cuDNN may add up gradients by atomic additions, in an order that changes from run to run, and with
`torch.backends.cudnn.benchmark` the algorithm itself is chosen by timing. Forward as well as
backward, the ops that call PyTorch's convolutions call them inside `repeatable`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_SWITCHES = threading.RLock()


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN takes deterministic algorithms only, and none by timing it.

    Its switches are the process's: they are put back at the end, and while one thread's are
    changed, another that comes here waits. Devices without cuDNN are left alone.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with _SWITCHES:
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
