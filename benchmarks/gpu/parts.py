"""The parts of a GPU run, in the order in which they matter if the time is short."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from benchmarks.ops.nearest_code import CASES
from benchmarks.suites import SUITES, load

from .runner import Part

_PYTHON = sys.executable
_SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
SIZES = {f"S{number}": case for number, case in enumerate(CASES["cuda"], start=1)}


_CONVOLUTION_TESTS = (
    "tests/kernels/triton/test_masked_conv2d.py",
    "tests/kernels/triton/test_gated_masked_conv.py",
    "tests/cuda/test_masked_conv2d.py",
)
_CONVOLUTIONS = (
    ("masked_conv2d", "bf16"),
    ("gated_layer", "bfloat16"),
    ("masked_conv2d", "float32"),
    ("masked_conv2d", "tf32"),
    ("gated_layer", "float32"),
)


def all_parts() -> list[Part]:
    """All parts; the limits are for parts that hang, not what they take."""
    others = [f"--ignore={file}" for file in _CONVOLUTION_TESTS]
    return [
        Part("tests", (*_pytest("tests/kernels/triton", "tests/cuda"), *others), 150.0),
        Part("tests-convolutions", _pytest(*_CONVOLUTION_TESTS), 240.0),
        *(_measure(f"search-{size}", "search", size, limit=45.0) for size in SIZES),
        *(_measure(f"step-{size}", "step", size, limit=45.0) for size in SIZES),
        *(_measure(f"sums-{size}", "sums", size, limit=30.0) for size in SIZES),
        *(
            _measure(f"{suite}-{dtype}", suite, dtype, limit=150.0)
            for suite, dtype in _CONVOLUTIONS
        ),
        *(_measure(f"suite-{name}", name, limit=75.0) for name in _other_suites()),
        _measure("adversarial", "adversarial", limit=60.0),
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
        _measure("tuning", "tuning", limit=90.0),
        _hopper(),
        _measure("instruction-rates", "rates", limit=30.0),
    ]


def _other_suites() -> list[str]:
    """Those with cases for a GPU whose sizes or dtypes are not parts of their own."""
    divided = {"nearest_code", "vector_quantize", "code_statistics", *dict(_CONVOLUTIONS)}
    return [name for name in SUITES if name not in divided and load(name).CASES["cuda"]]


def _pytest(*folders: str) -> tuple[str, ...]:
    there = [folder for folder in folders if Path(folder).exists()]
    return (_PYTHON, "-m", "pytest", "-q", "-m", "cuda", *there)


def _measure(name: str, *arguments: str, limit: float, absent: str | None = None) -> Part:
    return Part(name, (_PYTHON, "-m", "benchmarks.gpu.measure", *arguments), limit, absent)


def _sanitizer(tool: str) -> Part:
    program = next(filter(None, map(shutil.which, _SANITIZERS)), None)
    absent = None if program else "compute-sanitizer is not installed (it comes with CUDA)"
    command = (str(program), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    return Part(
        f"sanitizer-{tool}", (*command, _PYTHON, "-m", "benchmarks.gpu.small"), 60.0, absent
    )


def _hopper() -> Part:
    absent = None
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        absent = "the device is no Hopper GPU"
    return _measure("hopper-kernels", "hopper", limit=60.0, absent=absent)
