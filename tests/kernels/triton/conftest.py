"""Where the Triton kernels run: on the GPU, or under Triton's interpreter where there is none.

The static checks live in benchmarks/, which only `python -m pytest` finds by itself. They compile
in processes of their own, without the interpreter.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For benchmarks/static, and for the emulator beside this file.
sys.path += [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parent)]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test's tensors; each test runs wherever its kernels can."""
    if (request.param == "interpreter") != INTERPRETED:
        pytest.skip("the kernels run on the other device in this session (TRITON_INTERPRET)")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _no_kernel_leaves_its_tensors() -> Iterator[None]:
    """Holds for every launch under the interpreter, whatever the test asserts."""
    from address_check import addresses_checked

    with addresses_checked() if INTERPRETED else contextlib.nullcontext():
        yield
