"""Under Triton's interpreter: every number that is loaded or stored belongs to the launch.

A kernel that reads past the end of a tensor mostly reads what is thrown away later, so that no
value shows it; on a GPU it may fault. No test lives here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor


@contextlib.contextmanager
def addresses_checked() -> Iterator[None]:
    """Kernels raise where an address that is not masked lies in none of their tensors."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    convert = executor._init_args_hst
    allowed: list[tuple[int, int]] = []

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check("load", ptrs, mask, allowed)
        return load(self, ptrs, mask, *rest, **named)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check("store", ptrs, mask, allowed)
        return store(self, ptrs, value, mask, *rest, **named)

    def converted(self: Any, arguments: Any, by_name: Any) -> Any:
        found = convert(self, arguments, by_name)
        allowed[:] = _extents([*found[0], *found[1].values()])
        return found

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = converted
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor._init_args_hst = convert


def _extents(arguments: Any) -> Iterator[tuple[int, int]]:
    """First address and the one after the last of every tensor, in tuples and descriptors too."""
    for value in arguments:
        value = getattr(value, "base", value)
        if isinstance(value, tuple):
            yield from _extents(value)
        elif isinstance(value, Tensor) and value.numel():
            reach = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride()))
            yield value.data_ptr(), value.data_ptr() + (reach + 1) * value.element_size()


def _check(verb: str, pointers: Any, mask: Any, allowed: list[tuple[int, int]]) -> None:
    size = pointers.get_element_ty().primitive_bitwidth // 8
    first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
    inside = np.zeros(first.shape, dtype=bool)
    for low, high in allowed:
        inside |= (first >= low) & (first + size <= high)
    assert inside.all(), f"a kernel would {verb} {(~inside).sum()} numbers outside its tensors"
