"""The report of `fastvq info`: versions, devices, backends, instruction sets, precision switches.

Needs nothing beyond the library itself; packages that are absent are reported as such.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from fastvq import kernels
from fastvq.ops import backends
from fastvq.version import __version__

_PACKAGES = ("triton", "numpy", "accelerate", "pillow", "matplotlib", "scikit-learn", "tensorboard")
_GIB = 2**30


def report() -> str:
    """A few lines for each subject, for people.

    Raises:
        RuntimeError: `FASTVQ_CPU_ISA` names no instruction set, or one this machine lacks.
    """
    instruction_sets = _instruction_sets()  # first: it refuses a wrong FASTVQ_CPU_ISA
    return "\n".join(
        [
            f"fastvq {__version__}",
            *_section("versions", _versions()),
            *_section("devices", _devices()),
            *_section("backends", _backends()),
            *_section("CPU instruction sets", instruction_sets),
            *_section("precision", _precision()),
        ]
    )


def _section(title: str, lines: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in lines)
    return [f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in lines)]


def _versions() -> list[tuple[str, str]]:
    lines = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", str(torch.__version__)),
    ]
    for package in _PACKAGES:
        try:
            lines.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    return lines


def _devices() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [("cpu", f"{cores} cores for this process, {torch.get_num_threads()} torch threads")]
    if not torch.cuda.is_available():
        reason = "built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
        return [*lines, ("cuda", f"none (torch {torch.__version__}: {reason})")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            (
                f"cuda:{index}",
                f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, compute capability "
                f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}",
            )
        )
    return lines


def _backends() -> list[tuple[str, str]]:
    """For each backend the ops it can run, and for each op it cannot, why."""
    lines = []
    for backend in backends.BACKENDS:
        device = "cuda" if backend == "triton" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            lines.append((backend, "no CUDA device"))
            continue
        probe = torch.zeros(1, 1, device=device)
        reasons: dict[str | None, list[str]] = {}
        for op in backends.OPS:
            reason = backends.why_not(backend, op, probe)
            # One line for all ops that lack the same thing: the op's name is not part of it.
            general = None if reason is None else reason.replace(f" for {op}", "")
            reasons.setdefault(general, []).append(op)
        for general, ops in reasons.items():
            which = "every op" if len(ops) == len(backends.OPS) else ", ".join(ops)
            lines.append((backend, which if general is None else f"not {which}: {general}"))
    return lines


def _instruction_sets() -> list[tuple[str, str]]:
    asked = os.environ.get("FASTVQ_CPU_ISA")
    extension, reason = kernels.load_cpu_extension()
    if extension is None:
        return [("none", reason)]
    held = f" (held to at most {asked} by FASTVQ_CPU_ISA)" if asked else ""
    in_use = extension.isa_in_use()
    return [("found", ", ".join(extension.isa_available())), ("in use", f"{in_use}{held}")]


def _precision() -> list[tuple[str, str]]:
    def switch(on: bool) -> str:
        return "on" if on else "off"

    return [
        ("float32 matmul", torch.get_float32_matmul_precision()),
        ("TF32 in matmul", switch(torch.backends.cuda.matmul.allow_tf32)),
        ("TF32 in cuDNN", switch(torch.backends.cudnn.allow_tf32)),
    ]
