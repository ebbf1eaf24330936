"""A candidate in a process of its own: libraries that bring their own OpenMP or BLAS.

Several thread pools in one process take the cores from each other: FAISS needed twice its time
beside torch. A worker imports its library alone, waits on a pipe, and runs when it is told to, so
that rounds stay interleaved. It times itself: the pipe is not part of the time.
"""

from __future__ import annotations

import abc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import memory

_CHECKOUT = Path(__file__).parents[1]
_CACHE_BYTES = 256 * 2**20


class TimesItself(abc.ABC):
    """A candidate that runs elsewhere and says how long it took."""

    @abc.abstractmethod
    def __call__(self) -> None:
        """One run."""

    @abc.abstractmethod
    def result(self) -> np.ndarray:
        """What one run returns."""

    @abc.abstractmethod
    def time_ms(self, cold: bool = False) -> float:
        """Milliseconds of one run, by its own clock; `cold` evicts its caches before."""

    @abc.abstractmethod
    def peak_bytes(self) -> int | None:
        """See `memory.peak_bytes`."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what runs it."""


class _Commanded(TimesItself):
    """What runs in workers, when they are told to."""

    @abc.abstractmethod
    def send(self, command: str) -> None:
        """Tell the workers what to do: "run", "result", "time", "cold" or "peak"."""

    @abc.abstractmethod
    def answer(self) -> Any:
        """What they answer to the oldest command without an answer."""

    def ask(self, command: str) -> Any:
        self.send(command)
        return self.answer()

    def wait(self) -> None:
        """Until they are ready, which is their first answer; one that cannot be ends them."""
        try:
            self.answer()
        except RuntimeError:
            self.close()
            raise

    def __call__(self) -> None:
        self.ask("run")


class Isolated(_Commanded):
    """A function on arrays, in a worker.

    Args:
        function: "module:name"; it takes the arrays and the number of threads, and returns a
            callable without arguments that returns an array.
        arrays: float or integer arrays, by name.
        threads: of the library.
        wait: until it is ready; otherwise its first `answer` says so.
    Raises:
        RuntimeError: the worker cannot import or prepare it.
    """

    def __init__(
        self, function: str, arrays: dict[str, np.ndarray], threads: int, wait: bool = True
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        np.savez(Path(self._folder.name) / "arrays.npz", **arrays)
        count = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.isolated", function, self._folder.name, count],
            cwd=_CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if wait:
            self.wait()

    def result(self) -> np.ndarray:
        self.ask("result")
        return np.load(Path(self._folder.name) / "result.npy")

    def time_ms(self, cold: bool = False) -> float:
        return float(self.ask("cold" if cold else "time"))

    def peak_bytes(self) -> int | None:
        return self.ask("peak")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def send(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]


class Together(_Commanded):
    """One function in several workers that run at the same time, each on its own arrays.

    Its time is the longest of theirs, its result that of the first, its memory the sum.
    """

    def __init__(self, function: str, arrays: list[dict[str, np.ndarray]], threads: int) -> None:
        self._workers = [Isolated(function, own, threads, wait=False) for own in arrays]
        self.wait()

    def result(self) -> np.ndarray:
        for worker in self._workers[1:]:
            worker.send("run")
        found = self._workers[0].result()
        for worker in self._workers[1:]:
            worker.answer()
        return found

    def time_ms(self, cold: bool = False) -> float:
        return max(self.ask("cold" if cold else "time"))

    def peak_bytes(self) -> int | None:
        peaks = self.ask("peak")
        return None if None in peaks else sum(peaks)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def send(self, command: str) -> None:
        for worker in self._workers:
            worker.send(command)

    def answer(self) -> list[Any]:
        return [worker.answer() for worker in self._workers]


def _work() -> None:
    """The worker: prepares the function, then answers one line per command."""
    function, folder, threads = sys.argv[1:]
    # What libraries print would mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        module, _, name = function.partition(":")
        arrays = dict(np.load(Path(folder) / "arrays.npz"))
        run = getattr(importlib.import_module(module), name)(arrays, int(threads))
        run()
    except Exception as error:  # reported where the candidate is made
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return
    answer({"value": None})
    evicting = np.zeros(_CACHE_BYTES, dtype=np.uint8)
    for line in sys.stdin:
        answer({"value": _obey(line.strip(), run, evicting, Path(folder))})


def _obey(
    command: str, run: Callable[[], np.ndarray], evicting: np.ndarray, folder: Path
) -> int | float | None:
    if command == "result":
        np.save(folder / "result.npy", run())
        return None
    if command == "peak":
        return memory.peak_bytes(run)
    if command == "run":
        run()
        return None
    if command == "cold":
        evicting += 1
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    _work()
