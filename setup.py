"""Builds what pyproject.toml cannot say: the C++ core and the mapping of the `kernels/` tree.

The core is the private top-level module `_fastvq_C`: torch-free C++17 against Python's limited
API, so one wheel serves every Python from 3.10 on and every torch. Ninja compiles one object per
instruction set, in parallel. Where that cannot be done the install goes on without the core, says
why, and fastvq computes with its plain PyTorch reference.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/cpu")
# -ffp-contract=off: the canonical float64 scores must not use fused multiply-add; where it is
# wanted, the kernels ask for it by name.
# -Wno-psabi: how vectors are passed differs by instruction set; those of a file never leave it.
COMMON_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wno-psabi"),
]
AVX2_FLAGS = ["-mavx2", "-mfma"]
AVX512_FLAGS = [
    *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    # GCC 12 warns about its own AVX-512 header.
    *("-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
X86_FLAGS = {
    "nearest_code_avx2.cpp": AVX2_FLAGS,
    "nearest_code_avx512.cpp": AVX512_FLAGS,
    "nearest_code_vnni.cpp": AVX512_FLAGS,
    "nearest_code_amx.cpp": AVX512_FLAGS,
    "row_passes_avx2.cpp": AVX2_FLAGS,
    "row_passes_avx512.cpp": AVX512_FLAGS,
    # The priors' arithmetic has no canonical rounding to keep.
    "gated_activation_avx2.cpp": [*AVX2_FLAGS, "-ffp-contract=fast"],
    "gated_activation_avx512.cpp": [*AVX512_FLAGS, "-ffp-contract=fast"],
    "masked_conv_avx2.cpp": [*AVX2_FLAGS, "-ffp-contract=fast"],
    "masked_conv_avx512.cpp": [*AVX512_FLAGS, "-ffp-contract=fast"],
    "masked_conv_bf16.cpp": [*AVX512_FLAGS, "-ffp-contract=fast"],
    "sample_row_avx2.cpp": [*AVX2_FLAGS, "-ffp-contract=fast"],
    "sample_row_avx512.cpp": [*AVX512_FLAGS, "-ffp-contract=fast"],
}
# Flags that a compiler may be too old for; without them the file compiles to an empty search.
NEWER_FLAGS = {
    "nearest_code_vnni.cpp": ["-mavx512vnni"],
    "nearest_code_amx.cpp": ["-mamx-tile", "-mamx-int8"],
    "masked_conv_bf16.cpp": ["-mavx512bf16"],
}
MAX_JOBS = 2


class CoreUnavailable(Exception):
    """Why the C++ core cannot be built here."""


def find_compiler() -> list[str]:
    """The command of a C++ compiler that exists: $CXX, else the one Python names, else c++."""
    asked = os.environ.get("CXX")
    commands = [asked] if asked else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for command in map(shlex.split, filter(None, commands)):
        if command and shutil.which(command[0]):
            return command
    tried = f"CXX={asked}" if asked else "c++, g++, clang++"
    raise CoreUnavailable(f"no C++ compiler was found (looked for {tried})")


def find_ninja() -> str:
    """The ninja program: beside this Python, or on PATH (where pip puts build requirements)."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    program = shutil.which("ninja", path=os.pathsep.join(folders))
    if program is None:
        raise CoreUnavailable("ninja was not found (`pip install ninja`)")
    return program


def core_sources() -> dict[Path, list[str]]:
    """Each source file of this machine's core, with its own flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {
        source: X86_FLAGS.get(source.name, [])
        for source in sorted(SOURCES.glob("*.cpp"))
        if x86 or source.name not in X86_FLAGS
    }


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(compiler: list[str], output: Path) -> str:
    """The text of a build.ninja that makes `output`."""
    apple = sys.platform == "darwin"
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if apple else ["-shared"]
    include = ["-I" + sysconfig.get_path("include"), "-I" + sysconfig.get_path("platinclude")]
    newer = {name: own for name, own in NEWER_FLAGS.items() if accepts(compiler, own)}
    without = [] if "nearest_code_amx.cpp" in newer else ["-DFASTVQ_WITHOUT_AMX"]
    flags = shlex.join([*COMMON_FLAGS, *without, *dict.fromkeys(include)]).replace("$", "$$")
    lines = [
        f"cxx = {shlex.join(compiler)} -pthread",
        f"flags = {flags}",
        "rule compile",
        "  command = $cxx $flags $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shlex.join(shared)} $in -o $out{'' if apple else ' -ldl'}",
    ]
    objects = []
    for source, own in core_sources().items():
        objects.append(f"{source.stem}.o")
        lines += [
            f"build {objects[-1]}: compile {ninja_escape(str(source.resolve()))}",
            f"  own = {shlex.join([*own, *newer.get(source.name, [])])}",
        ]
    lines.append(f"build {ninja_escape(str(output.resolve()))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildCore(build_ext):
    """Compiles the core with ninja; drops it from the build where that fails."""

    def run(self) -> None:
        try:
            super().run()
        except CoreUnavailable as reason:
            print(
                f"fastvq: the C++ kernels were not built: {reason}. The installation goes on; "
                "fastvq will use its plain PyTorch reference, which is slower.",
                file=sys.stderr,
                flush=True,
            )
            self.extensions: list[Extension] = []

    def build_extension(self, ext: Extension) -> None:
        if os.name != "posix":
            raise CoreUnavailable("only Linux and macOS are supported")
        compiler, ninja = find_compiler(), find_ninja()
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler, output), encoding="utf-8")
        done = subprocess.run(
            [ninja, "-C", str(folder), "-j", str(min(MAX_JOBS, os.cpu_count() or 1))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        if done.returncode != 0:
            raise CoreUnavailable("compilation failed with the messages above")


setup(
    packages=[*find_packages(include=["fastvq", "fastvq.*"]), "fastvq.kernels.triton"],
    package_dir={"fastvq.kernels.triton": "kernels/triton"},
    package_data={"fastvq.kernels.triton": ["configs/*.json"]},
    ext_modules=[
        Extension(
            "_fastvq_C",
            [str(source) for source in core_sources()],
            depends=[str(header) for header in sorted(SOURCES.glob("*.h"))],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
