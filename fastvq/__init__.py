"""fastvq: exact vector quantization, the VQ-VAE family, and priors over their codes.

Names load on first use, so that `import fastvq` costs little more than `import torch`,
initialises no device and compiles nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastvq.version import __version__

_NAMES = {
    "CausalConv1d": "fastvq.nn",
    "Codebook": "fastvq.nn",
    "FSQ": "fastvq.nn",
    "GatedMaskedConv2d": "fastvq.nn",
    "GroupedResidualFSQ": "fastvq.nn",
    "GroupedResidualLFQ": "fastvq.nn",
    "GroupedResidualVQ": "fastvq.nn",
    "LFQ": "fastvq.nn",
    "MaskedConv2d": "fastvq.nn",
    "ResidualFSQ": "fastvq.nn",
    "ResidualLFQ": "fastvq.nn",
    "ResidualSimVQ": "fastvq.nn",
    "ResidualVQ": "fastvq.nn",
    "SimVQ": "fastvq.nn",
    "VectorQuantize": "fastvq.nn",
    "kmeans": "fastvq.nn",
    "replace_modules": "fastvq.compat",
}
_MODULES = ("compat", "models", "nn", "ops", "reference", "sampling")

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"fastvq.{name}")
    else:
        raise AttributeError(f"module 'fastvq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
