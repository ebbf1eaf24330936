"""Float32 that is float32: sampling turns TF32, bfloat16 products and autocast off while it runs.

Their errors (2⁻¹¹ and more per product) would pass the tolerance in `draw`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Float32 products in full precision, no autocast; the caller's settings come back after."""
    with torch.autocast(device.type, enabled=False):
        if not hasattr(torch.backends, "fp32_precision"):  # torch before 2.9
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                with torch.backends.cudnn.flags(
                    enabled=torch.backends.cudnn.enabled,
                    benchmark=torch.backends.cudnn.benchmark,
                    deterministic=torch.backends.cudnn.deterministic,
                    allow_tf32=False,
                ):
                    yield
            finally:
                torch.set_float32_matmul_precision(precision)
            return
        backends: tuple[Any, ...] = (
            torch.backends.cuda.matmul,
            torch.backends.cudnn.conv,  # type: ignore[attr-defined]
            torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
            torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
        )
        saved = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, saved):
                backend.fp32_precision = precision
