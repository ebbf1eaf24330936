"""Checks of arguments that several ops share: one clear line each."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape(tensor: Tensor) -> str:
    """A tensor's shape as users write it: (4096, 64)."""
    inner = ", ".join(str(size) for size in tensor.shape)
    return f"({inner},)" if tensor.dim() == 1 else f"({inner})"


def check_float(op: str, name: str, tensor: object) -> None:
    """TypeError unless `tensor` is a tensor of a dtype that the ops read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(tensor).__name__}.")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64; got "
            f"{str(tensor.dtype).removeprefix('torch.')}. Convert it with {name}.float()."
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be dense; got {str(tensor.layout).removeprefix('torch.')}. "
            f"Convert it with {name}.to_dense()."
        )


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on the device of x ({x.device}); got {tensor.device}. "
            f"Move it with {name}.to(x.device)."
        )


def check_rows(op: str, x: object) -> None:
    """`x` is (N, D) or (heads, N, D), D ≥ 1."""
    check_float(op, "x", x)
    assert isinstance(x, Tensor)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{op}: x must be (N, D) or (heads, N, D); got {shape(x)}. "
            f"Flatten the other dimensions first, as in x.reshape(-1, x.shape[-1])."
        )
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have at least one channel; got {shape(x)}.")
    if x.dim() == 3 and x.shape[0] == 0:
        raise ValueError(f"{op}: x must have at least one head; got {shape(x)}.")


def check_codebook(op: str, codebook: object, x: Tensor) -> None:
    """`codebook` is (K, D), or (heads, K, D) where `x` has heads; K ≥ 1."""
    check_float(op, "codebook", codebook)
    assert isinstance(codebook, Tensor)
    width = x.shape[-1]
    with_heads = x.dim() == 3 and codebook.dim() == 3 and codebook.shape[0] == x.shape[0]
    if not (codebook.dim() == 2 or with_heads) or codebook.shape[-1] != width:
        allowed = f"(K, {width})"
        if x.dim() == 3:
            allowed += f" or ({x.shape[0]}, K, {width})"
        raise ValueError(
            f"{op}: codebook must be {allowed} to match x {shape(x)}; got {shape(codebook)}."
        )
    if codebook.shape[-2] == 0:
        raise ValueError(f"{op}: codebook must hold at least one code; got {shape(codebook)}.")
    check_device(op, "codebook", codebook, x)


def check_choice(op: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = " or ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"{op}: {name} must be {listed}; got {value!r}.")


def check_int(op: str, name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int; got {type(value).__name__}.")
    if int(value) < least:
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}.")


def check_number(op: str, name: str, value: object) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__} {value!r}.")


def check_indices(op: str, name: str, indices: object, count: int, least: int = -1) -> None:
    """`indices` are integers in `least` … count − 1.

    Their values are looked at in eager mode on CPUs, where that takes no wait for a device.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(indices).__name__}.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(
            f"{op}: {name} must be integers; got {str(indices.dtype).removeprefix('torch.')}."
        )
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(value) for value in indices.aminmax())
    if low < least or high >= count:
        none = "−1 or " if least < 0 else ""
        raise ValueError(
            f"{op}: {name} must be {none}in 0 … {count - 1}; got {low if low < least else high}."
        )
