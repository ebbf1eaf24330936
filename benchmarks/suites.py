"""What a suite is. Running one is `running.py`.

A suite is a module with

    CASES         {"cpu": [case, …], "cuda": [case, …]}, a case being a dict of plain values
    QUICK_CASES   [case, …] of milliseconds on a laptop: for tests, `--quick` and pytest-benchmark
    prepare(case, context) -> Prepared

and a first docstring line that says what is timed. `prepare` makes the inputs, checks fastvq on
them (`WrongResult` if it is wrong: no time is then reported) and names the rivals.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from .isolated import TimesItself

SUITES = {
    "nearest_code": "benchmarks.ops.nearest_code",
    "vector_quantize": "benchmarks.ops.vector_quantize",
    "code_statistics": "benchmarks.ops.code_statistics",
    "quantizers": "benchmarks.nn.quantizers",
    "masked_conv2d": "benchmarks.ops.masked_conv2d",
    "gated_layer": "benchmarks.nn.gated_layer",
    "sampling": "benchmarks.end_to_end.sampling",
    "stage1_step": "benchmarks.end_to_end.stage1_step",
    "search_scale": "benchmarks.scale.search",
    "step_scale": "benchmarks.scale.step",
    "search_memory": "benchmarks.scale.memory",
    "processes": "benchmarks.scale.processes",
}
SUITES = {name: module for name, module in SUITES.items() if importlib.util.find_spec(module)}


class WrongResult(RuntimeError):
    """fastvq's result on a case's inputs is wrong."""


@dataclass(frozen=True)
class Context:
    """Where and how a run measures."""

    device: str = "cpu"
    threads: int = 2
    cold: bool = False
    seconds: float = 4.0


class Work(NamedTuple):
    """What a case asks of any implementation: the model behind the fraction of a roofline.

    Attributes:
        flops: multiply-adds count as two.
        bytes: inputs read once and results written once.
        dtype: of the matrix product that sets the rate, a name in torch.
    """

    flops: float
    bytes: float
    dtype: str = "float32"


@dataclass
class Prepared:
    """One case, ready to be timed.

    `candidates` maps names to callables without arguments, the first being the one that others are
    compared with; `absent` names those that cannot run and why; `notes` says of a candidate what
    its check found, or at which setting it runs.
    """

    work: Work | None = None
    candidates: dict[str, Callable[[], object]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    _rivals: dict[str, Callable[[], Callable[[], object]]] = field(default_factory=dict)

    def rival(self, name: str, make: Callable[[], Callable[[], object]]) -> None:
        """Add a candidate that may not be there.

        `make` imports, prepares and checks it when `build` is called, and returns what is timed;
        what it raises becomes the reason of its absence.
        """
        self._rivals[name] = make

    @property
    def names(self) -> list[str]:
        """All candidates, built or not."""
        return [*self.candidates, *self._rivals, *self.absent]

    def keep(self, names: set[str]) -> None:
        """Drop the candidates not named, before they are built."""
        for among in (self.candidates, self._rivals, self.absent):
            for name in among.keys() - names:
                del among[name]

    def build(self) -> None:
        """Make the rivals."""
        while self._rivals:
            name = next(iter(self._rivals))
            make = self._rivals.pop(name)
            try:
                self.candidates[name] = make()
            except Exception as reason:  # whatever ails a rival, the report goes on and says so
                first_line = (str(reason).splitlines() or [""])[0]
                self.absent[name] = f"{type(reason).__name__}: {first_line}"

    def close(self) -> None:
        """End the processes of isolated candidates."""
        for run in self.candidates.values():
            if isinstance(run, TimesItself):
                run.close()
        self.candidates.clear()


def load(name: str) -> ModuleType:
    """The module of a suite."""
    return importlib.import_module(SUITES[name])


def summary(name: str) -> str:
    """The first line of a suite's docstring."""
    return (load(name).__doc__ or "").splitlines()[0]


def parse_case(text: str) -> dict[str, Any]:
    """ "N=512,K=64" as {"N": 512, "K": 64}; values are Python literals or plain words.

    Raises:
        ValueError: a part without "=".
    """
    import ast

    case: dict[str, Any] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"--case must be KEY=VALUE,…; got {text!r}.")
        try:
            case[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            case[key.strip()] = value
    return case
