"""Which backend runs a call, and why not another.

One predicate, `why_not`, both selects and refuses, so the two can never disagree.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastvq.kernels import load_cpu_extension

CPU_EXTENSION, _CPU_EXTENSION_MISSING = load_cpu_extension()
BACKENDS = ("triton", "cpp", "reference")

# The kernels that exist, by backend, with the dtypes they read.
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS: dict[str, frozenset[str]] = {
    "triton": frozenset(),
    "cpp": frozenset({"nearest_code", "code_statistics"}),
}
# Ops assembled from another op's kernel and ordinary tensor arithmetic.
_SEARCH = {"vector_quantize": "nearest_code", "residual_quantize": "nearest_code"}
# Ops whose default is PyTorch's own convolution, run over the live taps alone.
_CONVOLUTIONS = frozenset({"masked_conv2d", "causal_conv1d"})
OPS = (
    "nearest_code",
    "vector_quantize",
    "code_statistics",
    "residual_quantize",
    "masked_conv2d",
    "causal_conv1d",
)
_DEVICE = {"triton": "cuda", "cpp": "cpu"}
_warned: set[str] = set()


def why_not(backend: str, op: str, *tensors: Tensor) -> str | None:
    """The reason `backend` cannot run `op` on these tensors; None if it can."""
    if backend == "reference":
        return None
    if _kernel_of(op) not in _KERNELS[backend]:
        return f"this version has no {backend} kernel for {op}"
    for tensor in tensors:
        if tensor.device.type != _DEVICE[backend]:
            return f"it runs on {_DEVICE[backend]} tensors and one is on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in _KERNEL_DTYPES:
            return f"its kernels read float32, float16 and bfloat16, not {_name(tensor.dtype)}"
    if backend == "cpp" and CPU_EXTENSION is None:
        return _CPU_EXTENSION_MISSING
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
        reason = why_not(backend, op, *tensors)
        if reason is not None:
            raise RuntimeError(
                f'{op}: backend="{backend}" cannot run: {reason}. '
                f'Use backend="reference", or None to let fastvq choose.'
            )
        return backend
    for candidate in ("triton", "cpp"):
        if why_not(candidate, op, *tensors) is None:
            return candidate
    _warn_of_fallback(op, *tensors)
    return "reference"


def _warn_of_fallback(op: str, *tensors: Tensor) -> None:
    """Say once why a kernel made for this device does not run."""
    if torch.compiler.is_compiling() or _kernel_of(op) not in _KERNELS["cpp"]:
        return
    reason = why_not("cpp", op, *tensors)
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    meant_for_it = on_cpu and all(tensor.dtype != torch.float64 for tensor in tensors)
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
        reason = why_not(candidate, op, *tensors)
        lines.append(f"  {candidate}: {'can run' if reason is None else reason}")
        if reason is None and answer is None:
            answer = candidate
    if answer == "reference" and backend is None and op in _CONVOLUTIONS:
        head = f"{op}: PyTorch's own convolution, over the live taps alone"
    elif answer is None:
        head = f"{op}: refused"
    else:
        head = f"{op}: {answer}"
    return "\n".join([head, *lines])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
