"""Ahead-of-time compilation of Triton and Gluon kernels, without a GPU.

A kernel is compiled exactly as its launcher would launch it: `record_launches` runs the launcher on
CPU tensors and keeps every launch instead of making it, and `compile_launch` gives the arguments to
Triton's own binder, so that types, divisibility and constants are those of a real call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch that a launcher asked for: the kernel with its arguments and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """The values of the kernel's constexpr parameters."""
        bound = self.kernel.signature.bind_partial(
            *self.arguments,
            **{k: v for k, v in self.keywords.items() if k in self.kernel.signature.parameters},
        )
        bound.apply_defaults()
        return {p.name: bound.arguments[p.name] for p in self.kernel.params if p.is_constexpr}


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """A compiled kernel: its texts and what the assembler says about its resources."""

    name: str
    capability: int
    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside, a kernel launch is appended to the list that is given, and nothing runs."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args)), **keywords})
        launches.append(Launch(self, tuple(grid), args, keywords))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, capability: int) -> MachineCode:
    """Compile what was launched for sm_<capability>, from scratch.

    Args:
        launch: from `record_launches`.
        capability: 80, 90 or 100.
    Returns:
        The machine code as text, with its resources.
    Raises:
        ValueError: the launch leaves it to Triton whether multiply-adds are fused. Triton 3.9
            warns of that on every first launch, and 3.10 changes the answer.
        Whatever Triton or the assembler raises: a kernel that does not compile is an error.
    """
    if "enable_fp_fusion" not in launch.keywords:
        raise ValueError(
            f"compile_launch: a launch must pass enable_fp_fusion; got none for {launch.name}. "
            f"Add it to the launcher."
        )
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    keywords = {"debug": False, **launch.keywords}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, None
    )
    source_type: Callable[..., Any] = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_type = GluonASTSource
    source = source_type(kernel, signature, constants, attributes)
    with _fresh_cache():
        compiled = triton.compile(source, target=target, options=options.__dict__)
        return _read(compiled, capability)


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    # A cached kernel would hide a compiler that changed under the same version number.
    with tempfile.TemporaryDirectory() as folder:
        cache = {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1"}
        with mock.patch.dict(os.environ, cache):
            yield


def _read(compiled: Any, capability: int) -> MachineCode:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _run(tools / "nvdisasm", "-c", str(cubin))
        usage = _run(tools / "cuobjdump", "-res-usage", str(cubin))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    metadata = compiled.metadata
    return MachineCode(
        name=metadata.name,
        capability=capability,
        ptx=compiled.asm["ptx"],
        sass=sass,
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        shared_bytes=metadata.shared,
        warps=metadata.num_warps,
    )


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout
