"""Results as data: one JSON line per case and run, appended and never changed."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastvq.kernels import load_cpu_extension

FOLDER = Path(__file__).parent / "results"
_CHECKOUT = Path(__file__).parents[1]
_ROOMS = ("fastvq", "kernels", "benchmarks", "tests")
_SUFFIXES = {".py", ".json", ".cpp", ".h"}
_PACKAGES = (
    *("torch", "triton", "numpy", "faiss-cpu", "vector-quantize-pytorch", "scikit-learn"),
    *("flash-kmeans", "pykeops"),
)


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on: the processor, and the GPU where one is used."""
    extension, _ = load_cpu_extension()
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "isa": extension.isa_in_use() if extension is not None else None,
        "system": platform.system(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of every package that is timed and installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source() -> dict[str, Any]:
    """The commit, and whether files differ from it; nothing outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(changes)}


def sources_digest(root: Path = _CHECKOUT) -> str:
    """Digest of every source file: a commit says too little where the tree is dirty or bare."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def append(record: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Add one record to the file of its machine."""
    described = record["machine"]
    name = described.get("gpu") or described["cpu"]
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join([*words, str(described["cores"]) + "cores"]) + ".jsonl")
    stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": stamp, **record}) + "\n")
    return path


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All records, oldest first in each machine's file."""
    return [
        json.loads(text)
        for path in sorted(folder.glob("*.jsonl"))
        for text in path.read_text(encoding="utf-8").splitlines()
    ]


def key(record: dict[str, Any]) -> str:
    """What a later record of the same kind replaces: suite, case, threads and cache."""
    return json.dumps([record[name] for name in ("suite", "case", "threads", "cache")])


def latest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of suites' records on the CPU of the machine of the newest of them, the last of each kind.

    A red record takes the times that came before it away.
    """
    timed = [one for one in found if "cache" in one and one.get("device", "cpu") == "cpu"]
    if not timed:
        return []
    cpu = max(timed, key=lambda record: record["time"])["machine"]["cpu"]
    last = {key(record): record for record in timed if record["machine"]["cpu"] == cpu}
    return [record for record in last.values() if "red" not in record]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
