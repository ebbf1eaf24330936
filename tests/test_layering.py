"""Imports point one way, read from the sources with ast.

    cli → train → {models, compat, sampling} → nn → ops → {kernels, reference}

Also here: what no source file may hold, whatever its room.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room may import, itself and `version` aside. All imports count: those inside functions
# and under TYPE_CHECKING too.
_LEAVES = {"kernels", "reference"}
_OPS = {"ops", *_LEAVES}
_NN = {"nn", *_OPS}
_TRAIN = {"models", "compat", "sampling", *_NN}
ROOMS: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"train", *_TRAIN},
    "train": _TRAIN,
    "models": {"sampling", *_NN},
    "compat": _NN,
    "sampling": _NN,
    "nn": _OPS,
    "ops": _LEAVES,
    "kernels": set(),
    "reference": set(),
    "version": set(),
    # fastvq/__init__.py itself, the face of the package: only importing it must stay cheap, and
    # that is measured in test_import.py. Nothing inside imports from it.
    "": set(),
}
# The reference is the definition of truth: nothing but PyTorch behind it.
REFERENCE_MAY_IMPORT = {"__future__", "torch", "typing"}


def find_modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its import name; the top-level kernels/ as it is imported."""
    modules = {}
    for path in sorted([*root.glob("fastvq/**/*.py"), *root.glob("kernels/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] == "kernels":
            parts = ("fastvq", *parts)
        modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def find_imports(name: str, path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name taken from it or None) of every import in a module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
            relative = [*parents, node.module] if node.module else parents
            source = ".".join(relative) if node.level else node.module
            assert source is not None
            for alias in node.names:
                yield node.lineno, source, alias.name
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value), None


def find_violations(root: Path) -> list[str]:
    """One line for every import that points the wrong way, and one for a cycle."""
    modules = find_modules(root)
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        room = _room(name)
        graph[name] = set()
        for line, source, taken in find_imports(name, path):
            where = f"{path.relative_to(root).as_posix()}:{line}"
            target = f"{source}.{taken}" if f"{source}.{taken}" in modules else source
            if target.partition(".")[0] != "fastvq":
                outside = target.partition(".")[0]
                if room == "reference" and outside not in REFERENCE_MAY_IMPORT:
                    found.append(f"{where}: reference imports torch only; got {outside}")
                continue
            if target in modules:
                graph[name].add(target)
            if room not in ROOMS:
                found.append(f"{where}: {room} is not a room; they are {', '.join(ROOMS)}")
            elif target == "fastvq":
                found.append(f"{where}: {taken or target} must be imported from its own room")
            elif _room(target) not in ROOMS[room] | {room, "version"}:
                found.append(f"{where}: {room} must not import {_room(target)} ({target})")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("cycle: " + " → ".join(reversed(error.args[1])))
    return found


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_point_one_way() -> None:
    names = find_modules(ROOT)
    assert {"fastvq.nn", "fastvq.reference.nearest_code", "fastvq.kernels.triton"} <= set(names)
    assert find_violations(ROOT) == []


PLANTED = {
    "upward": ("nn/a.py", "from fastvq.models import VAE", "nn must not import models"),
    "upward, plain": ("ops/a.py", "import fastvq.nn.b", "ops must not import nn"),
    "upward, relative": ("ops/a.py", "from ..nn import b", "ops must not import nn"),
    "upward, submodule": ("nn/a.py", "from fastvq import sampling", "nn must not import sampling"),
    "in a function": (
        "models/a.py",
        "def f():\n    import fastvq.train",
        "models must not import train",
    ),
    "by name": (
        "kernels/a.py",
        "import importlib\nimportlib.import_module('fastvq.ops')",
        "kernels must not import ops",
    ),
    "sideways": ("sampling/a.py", "from fastvq import models", "sampling must not import models"),
    "leaf to leaf": ("reference/a.py", "from fastvq import kernels", "must not import kernels"),
    "reference, outside": ("reference/a.py", "import numpy as np", "reference imports torch only"),
    "the face": ("train/a.py", "from fastvq import kmeans", "kmeans must be imported from its own"),
    "a new room": ("misc/a.py", "import fastvq.nn", "misc is not a room"),
    "cycle": ("nn/a.py", "from . import b", "cycle: "),
}


def plant(root: Path, path: str, text: str) -> None:
    file = root / "fastvq" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize(("path", "text", "message"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_caught(path: str, text: str, message: str, tmp_path: Path) -> None:
    for room in ROOMS.keys() - {"", "__main__", "cli", "version"}:
        plant(tmp_path, f"{room}/__init__.py", "")
    plant(tmp_path, "__init__.py", "from fastvq.version import __version__")
    plant(tmp_path, "version.py", "import numpy")
    plant(tmp_path, "nn/b.py", "from fastvq import ops\nfrom fastvq.version import __version__")
    assert find_violations(tmp_path) == []
    if message == "cycle: ":
        plant(tmp_path, "nn/b.py", "from fastvq.nn.a import c")
    plant(tmp_path, path, text)
    (violation,) = find_violations(tmp_path)
    assert message in violation


def source_files() -> list[Path]:
    """The files that a checkout holds and nobody generated."""
    folders = ("fastvq", "kernels", "benchmarks", "tests", ".ci")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    beside = [path for path in ROOT.iterdir() if path.is_file()]
    generated = {".so", ".pyc", ".png"}
    return [path for path in [*inside, *beside] if path.suffix not in generated]


def test_no_file_is_named_utils() -> None:
    assert [path for path in source_files() if path.stem in ("util", "utils")] == []


def test_no_path_of_one_machine() -> None:
    machine_path = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|scratch)/")
    found = []
    for path in source_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine_path.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
