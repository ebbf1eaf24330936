"""What `import fastvq` loads, what it costs, and that every public name is there."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys

import pytest

import fastvq

OPTIONAL = {"accelerate", "matplotlib", "PIL", "sklearn", "tensorboard", "tqdm", "triton"}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_extra_and_starts_no_device() -> None:
    loaded, initialized = json.loads(
        python(
            "import json, sys, torch\n"
            "before = set(sys.modules)\n"
            "import fastvq\n"
            "for name in fastvq.__all__: getattr(fastvq, name)\n"
            "new = sorted({name.partition('.')[0] for name in set(sys.modules) - before})\n"
            "print(json.dumps([new, torch.cuda.is_initialized()]))"
        )
    )
    assert "fastvq" in loaded
    assert OPTIONAL & set(loaded) == set()
    assert not initialized


@pytest.mark.parametrize(
    ("names", "bound"),
    [
        ('["VectorQuantize"]', 0.1),
        ("fastvq.__all__", 0.2),  # no program uses all of them; each loads its own module
    ],
)
def test_import_costs_little_over_torch(names: str, bound: float) -> None:
    """`import fastvq` and the first use of names in it, against `import torch` before them.

    Both are timed in one process, so that a slow machine slows both. Three processes, of which the
    median counts: one that is interrupted decides nothing.
    """
    code = (
        "import time\n"
        "start = time.perf_counter()\n"
        "import torch\n"
        "middle = time.perf_counter()\n"
        "import fastvq\n"
        f"for name in {names}: getattr(fastvq, name)\n"
        "print((time.perf_counter() - middle) / (middle - start))"
    )
    assert statistics.median(float(python(code)) for _ in range(3)) < bound


def test_every_public_name_resolves() -> None:
    assert len(set(fastvq.__all__)) == len(fastvq.__all__)
    for name in fastvq.__all__:
        assert getattr(fastvq, name) is not None
    assert set(fastvq.__all__) <= set(dir(fastvq))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        getattr(fastvq, "no_such_name")  # noqa: B009


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvq", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fastvq")
    for command in ("demo", "train", "encode", "train-prior", "sample", "reconstruct", "info"):
        assert command in done.stdout


@pytest.mark.skipif(
    os.environ.get("FASTVQ_NO_EXTENSION") == "1", reason="FASTVQ_NO_EXTENSION=1 asks for none"
)
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)
def test_the_cpp_core_is_built() -> None:
    """A silent fall to the reference would leave the C++ kernels untested."""
    importlib.import_module("_fastvq_C")
