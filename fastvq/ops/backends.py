"""Which backend runs a call, and why not another.

One predicate, `why_not`, both selects and refuses, so the two can never disagree.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.kernels import load_cpu_extension

CPU_EXTENSION, _CPU_EXTENSION_MISSING = load_cpu_extension()
BACKENDS = ("triton", "cpp", "reference")

# The kernels that exist, by backend, with the dtypes they read.
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS: dict[str, frozenset[str]] = {
    "triton": frozenset(
        {
            "nearest_code",
            "code_statistics",
            "masked_conv2d",
            "causal_conv1d",
            "gated_masked_conv",
            "sample_row",
        }
    ),
    "cpp": frozenset(
        {
            "nearest_code",
            "code_statistics",
            "masked_conv2d",
            "causal_conv1d",
            "gated_masked_conv",
        }
    ),
}
# Ops assembled from another op's kernel and ordinary tensor arithmetic.
_SEARCH = {"vector_quantize": "nearest_code", "residual_quantize": "nearest_code"}
# Ops that PyTorch's own convolution can run too, over the live taps alone.
_CONVOLUTIONS = frozenset({"masked_conv2d", "causal_conv1d"})
# Where PyTorch is the faster of two, by op and the backend that is not.
_TORCH_IS_FASTER: dict[tuple[str, str], Callable[..., str | None]] = {}
OPS = (
    "nearest_code",
    "vector_quantize",
    "code_statistics",
    "residual_quantize",
    "masked_conv2d",
    "causal_conv1d",
    "gated_masked_conv",
)
_DEVICE = {"triton": "cuda", "cpp": "cpu"}
_OLDEST_TRITON = (3, 6)
# Ampere: the first with asynchronous copies and bfloat16.
_OLDEST_CAPABILITY = (8, 0)
_warned: set[str] = set()


def why_not(backend: str, op: str, *tensors: Tensor, by_name: bool = False) -> str | None:
    """The reason `backend` cannot run `op` on these tensors; None if it can.

    `by_name`: the call names this backend. Only then may Triton's interpreter, which runs the
    GPU's kernels on a CPU to check their values, serve.
    """
    if backend == "reference":
        return None
    if _kernel_of(op) not in _KERNELS[backend]:
        return f"this version has no {backend} kernel for {op}"
    interpreted = backend == "triton" and by_name and os.environ.get("TRITON_INTERPRET") == "1"
    for tensor in tensors:
        if tensor.device.type != ("cpu" if interpreted else _DEVICE[backend]):
            return f"it runs on {_DEVICE[backend]} tensors and one is on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in _KERNEL_DTYPES:
            return f"its kernels read float32, float16 and bfloat16, not {_name(tensor.dtype)}"
    if backend == "cpp" and CPU_EXTENSION is None:
        return _CPU_EXTENSION_MISSING
    if backend == "triton":
        if op in _CONVOLUTIONS and len(tensors) > 1 and tensors[0].shape[1] != tensors[1].shape[1]:
            return "its kernels do not divide channels into groups"
        return _triton_missing() or (None if interpreted else _gpu_too_old(*tensors))
    return None


def prefer_torch(op: str, backend: str, rule: Callable[..., str | None]) -> None:
    """Where nobody names a backend, let PyTorch run `op` instead of `backend` wherever
    `rule(*tensors)` gives a reason."""
    _TORCH_IS_FASTER[op, backend] = rule


def _torch_is_faster(op: str, backend: str, *tensors: Tensor) -> str | None:
    rule = _TORCH_IS_FASTER.get((op, backend))
    return None if rule is None else rule(*tensors)


@functools.cache
def _triton_missing() -> str | None:
    """Why there is no Triton to compile kernels with; read without importing it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed (`pip install triton`)"
    oldest = ".".join(map(str, _OLDEST_TRITON))
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"its kernels need triton {oldest} or newer, and this is {version}"
    return None


def _gpu_too_old(*tensors: Tensor) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, and this PyTorch is built for AMD's"
    for tensor in tensors:
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < _OLDEST_CAPABILITY:
            return (
                f"its kernels need compute capability 8.0 or higher, and {tensor.device} has "
                f"{capability[0]}.{capability[1]}"
            )
    return None


def choose(op: str, backend: str | None, *tensors: Tensor) -> str:
    """The backend of this call: the one asked for, or the first that can run it.

    Raises:
        ValueError: `backend` is not the name of one.
        RuntimeError: the backend asked for cannot run this call.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"{op}: backend must be one of {', '.join(BACKENDS)} or None; got {backend!r}."
            )
        reason = why_not(backend, op, *tensors, by_name=True)
        if reason is not None:
            raise RuntimeError(
                f'{op}: backend="{backend}" cannot run: {reason}. '
                f'Use backend="reference", or None to let fastvq choose.'
            )
        return backend
    for candidate in ("triton", "cpp"):
        if why_not(candidate, op, *tensors) is None:
            slower = _torch_is_faster(op, candidate, *tensors) is not None
            return "reference" if slower else candidate
    _warn_of_fallback(op, *tensors)
    return "reference"


def _warn_of_fallback(op: str, *tensors: Tensor) -> None:
    """Say once why a kernel made for this device does not run."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    backend = "cpp" if on_cpu else "triton"
    if torch.compiler.is_compiling() or _kernel_of(op) not in _KERNELS[backend]:
        return
    reason = why_not(backend, op, *tensors)
    meant_for_it = all(
        tensor.device.type == _DEVICE[backend] and tensor.dtype != torch.float64
        for tensor in tensors
    )
    if meant_for_it and reason is not None and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"fastvq: {op} runs on the plain PyTorch path, which is slower: {reason}.",
            RuntimeWarning,
            stacklevel=4,
        )


def _kernel_of(op: str) -> str:
    return _SEARCH.get(op, op)


def explain(op: str, *tensors: Tensor, backend: str | None = None) -> str:
    """Which backend a call of `op` on these tensors takes, and why not the others.

    Args:
        op: the name of a function of `fastvq.ops`.
        tensors: the tensors the call would get.
        backend: what the call would pass as `backend`.
    Returns:
        A few lines of text, the answer first.
    Raises:
        ValueError: no such op, or no such backend.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}; got {op!r}.")
    if backend not in (None, *BACKENDS):
        raise ValueError(
            f"explain: backend must be one of {', '.join(BACKENDS)} or None; got {backend!r}."
        )
    lines = []
    answer = None
    for candidate in BACKENDS if backend is None else (backend,):
        reason = why_not(candidate, op, *tensors, by_name=backend is not None)
        slower = None
        if reason is None and backend is None:
            slower = _torch_is_faster(op, candidate, *tensors)
        slow = "" if slower is None else f", but PyTorch's convolution is faster: {slower}"
        lines.append(f"  {candidate}: {reason or 'can run' + slow}")
        if reason is None and slower is None and answer is None:
            answer = candidate
    if answer == "reference" and backend is None and op in _CONVOLUTIONS:
        head = f"{op}: PyTorch's own convolution, over the live taps alone"
    elif answer is None:
        head = f"{op}: refused"
    else:
        head = f"{op}: {answer}"
    if (op, answer) == ("gated_masked_conv", "cpp") and tensors[0].dtype == torch.float32:
        head += ", from 16 channels and 1024 pixels on with fewer products (Winograd)"
    return "\n".join([head, *lines])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
