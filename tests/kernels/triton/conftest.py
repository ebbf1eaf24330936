"""Where the Triton kernels run: on the GPU, or under Triton's interpreter where there is none."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test's tensors; each test runs wherever its kernels can."""
    if (request.param == "interpreter") != INTERPRETED:
        pytest.skip("the kernels run on the other device in this session (TRITON_INTERPRET)")
    return "cpu" if INTERPRETED else "cuda"
