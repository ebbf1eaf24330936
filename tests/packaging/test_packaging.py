"""The package as users get it: from a wheel, editable (plain and strict), and from the repository.

Every install happens in an environment of its own that sees this one's libraries, torch included,
but not this one's fastvq. The sources are copied first, so that nothing is built in the checkout.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("fastvq", "kernels", "tests"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"),
)
# What says where the modules came from, and that no top-level `kernels` came along.
PROBE = """
    import sys
    import fastvq.kernels, fastvq.kernels.triton as triton
    core, reason = fastvq.kernels.load_cpu_extension()
    assert "kernels" not in sys.modules and triton.__name__ == "fastvq.kernels.triton"
    print(fastvq.__file__, triton.__file__, core and core.__file__, reason, sep="\\n")
"""
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def run(*command: str | Path, cwd: Path, env: dict[str, str | None] | None = None) -> str:
    """Standard output and error of a command that must succeed; env None entries are unset."""
    merged = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in merged.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with one tuned-tiles file added."""
    copy = tmp_path_factory.mktemp("tree")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=built)
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "kernels/triton/configs").mkdir(exist_ok=True)
    (copy / "kernels/triton/configs/some-device.json").write_text("{}\n", encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that offers this environment's installed packages, fastvq left out."""
    folder = tmp_path_factory.mktemp("libraries")
    for packages in dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib")]):
        for entry in Path(packages).glob("*"):
            link = folder / entry.name
            if "fastvq" not in entry.name and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    return folder


class Environment:
    """A virtual environment that sees `libraries`."""

    def __init__(self, folder: Path, libraries: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        purelib = run(
            self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        )
        (Path(purelib.strip()) / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
        self.ninja_path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")

    def pip(self, *arguments: str | Path, cwd: Path, **env: str | None) -> str:
        quiet = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-v")
        settings: dict[str, str | None] = {"PATH": self.ninja_path, **env}
        return run(
            self.python, "-m", "pip", arguments[0], *quiet, *arguments[1:], cwd=cwd, env=settings
        )

    def probe(self, cwd: Path) -> list[str]:
        code = textwrap.dedent(PROBE)
        return run(self.python, "-c", code, cwd=cwd).strip().splitlines()


@pytest.fixture
def environment(tmp_path: Path, libraries: Path) -> Environment:
    return Environment(tmp_path / "environment", libraries)


@pytest.fixture(scope="module")
def wheel(tree: Path, libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    builder = Environment(folder / "environment", libraries)
    builder.pip("wheel", "--wheel-dir", folder, tree, cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stem.split("-")[2:4] == ["cp310", "abi3"] or not HAS_COMPILER
    tops = {name.split("/")[0] for name in names}
    core = {"_fastvq_C.abi3.so"} if HAS_COMPILER else set()
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastvq"} | core
    assert "fastvq/kernels/__init__.py" in names
    assert "fastvq/kernels/triton/__init__.py" in names
    assert "fastvq/kernels/triton/configs/some-device.json" in names
    for source in (ROOT / "fastvq").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names


@pytest.mark.parametrize("kind", ["wheel", "editable", "strict editable"])
def test_imports_from_every_install(
    kind: str, environment: Environment, tree: Path, wheel: Path, tmp_path: Path
) -> None:
    strict = ["--config-settings", "editable_mode=strict"] if kind == "strict editable" else []
    what = [wheel] if kind == "wheel" else [*strict, "--editable", tree]
    environment.pip("install", *what, cwd=tmp_path)
    for place in (tmp_path, tree):  # elsewhere, and the repository root with its own kernels/
        package, triton, core, *reason = environment.probe(place)
        assert Path(triton).name == "__init__.py"
        from_tree = tree / "fastvq" in Path(package).parents  # strict: links under tree/build
        assert from_tree == (place == tree or kind == "editable")
        if HAS_COMPILER:
            assert Path(core).name == "_fastvq_C.abi3.so", reason
    absent = "import importlib.util as u; assert u.find_spec('kernels') is None"
    run(environment.python, "-c", absent, cwd=tmp_path)


@pytest.mark.parametrize(
    ("kind", "broken", "why"),
    [
        ("wheel", {"CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ("editable", {"CXX": None, "PATH": "/nonexistent"}, "no C++ compiler was found"),
        ("strict editable", {"CXX": "false"}, "compilation failed"),
    ],
)
def test_installs_without_a_compiler(
    kind: str,
    broken: dict[str, str | None],
    why: str,
    environment: Environment,
    tree: Path,
    tmp_path: Path,
) -> None:
    # A copy of its own: the tree may hold a core that another test's editable install built.
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "build"))
    strict = ["--config-settings", "editable_mode=strict"] if kind == "strict editable" else []
    what = [copy] if kind == "wheel" else [*strict, "--editable", copy]
    output = environment.pip("install", *what, cwd=tmp_path, **broken)
    assert f"fastvq: the C++ kernels were not built: {why}" in output
    assert "plain PyTorch reference" in output
    _, _, core, reason = environment.probe(tmp_path)
    assert core == "None"
    assert "the C++ kernels are not built" in reason
