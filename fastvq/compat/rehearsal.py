"""A rehearsal: does an adapter compute what the module it stands in for computes?

Names and attributes say which class a module claims to be; a fork may keep them and compute
something else. So both run once on a small random batch, as copies on the CPU: in float64, where
rounding moves neither an index nor a digit that counts, unless a host insists on float32.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Relative to the largest element: far above the rounding of a few hundred operations, and far below
# what another formula makes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def difference(
    host: nn.Module,
    adapter: nn.Module,
    make_probe: Callable[[Any], tuple[Tensor, ...]],
    fill: Callable[[Any], None],
    dtype: torch.dtype = torch.float64,
) -> str | None:
    """How `adapter` differs from `host` on the arguments that `make_probe` gives; None if not.

    Compared are outputs in evaluation, then outputs, state and gradients of a training step.
    There is none where the host itself cannot take one, nor among several processes, where
    it could wait for the others. Neither module is changed, nor the random state.
    """
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = tuple(value.to(dtype) for value in make_probe(host))
        try:
            copies = [_copy_on_cpu(module, dtype) for module in (host, adapter)]
            for module in copies:
                torch.manual_seed(1)
                with torch.no_grad():
                    fill(module)
        except Exception as error:  # the host's own code: whatever it raises is an answer
            return f"it cannot be copied for a rehearsal: {_first_line(error)}"
        for training in (False, True) if alone else (False,):
            try:
                expected = _run(copies[0], probe, training)
            except Exception as error:
                if training:
                    return None
                return f"its own forward fails on a small batch: {_first_line(error)}"
            try:
                got = _run(copies[1], probe, training)
            except Exception as error:
                return f"a replacement would fail on a small batch: {_first_line(error)}"
            where = _compare("result", expected, got, _TOLERANCE[dtype])
            if where is not None:
                mode = "training" if training else "evaluation"
                return f"it computes something else in {mode}: {where}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _run(module: nn.Module, probe: tuple[Any, ...], training: bool) -> Any:
    """Outputs, and in training also the state after the step and the gradients."""
    module.train(training)
    arguments = [
        value.clone().requires_grad_() if value.is_floating_point() else value for value in probe
    ]
    torch.manual_seed(0)
    outputs = module(*arguments)
    if not training:
        return outputs
    pulled = [value.sum() for _, value in _tensors("", outputs) if value.requires_grad]
    if pulled:
        torch.stack(pulled).sum().backward()
    gradients = {f"grad of argument {i}": value.grad for i, value in enumerate(arguments)}
    gradients |= {f"grad of {name}": value.grad for name, value in module.named_parameters()}
    return {"output": outputs, "state": dict(module.state_dict()), "gradients": gradients}


def _copy_on_cpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` with all floating tensors in `dtype`, on the CPU."""
    copies: dict[int, Any] = {}
    # Plain attributes too: a weight made by weight normalisation is one, and part of a graph.
    held = [value for part in module.modules() for value in part.__dict__.values()]
    tensors = [value for value in held if isinstance(value, Tensor)]
    for tensor in [*module.parameters(), *module.buffers(), *tensors]:
        twin = tensor.detach().to("cpu", copy=True)
        twin = twin.to(dtype) if twin.is_floating_point() else twin
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = twin
    return copy.deepcopy(module, copies)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with the way to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from _tensors(f"{name}[{position}]", item)


def _compare(name: str, expected: Any, got: Any, tolerance: float) -> str | None:
    """The first difference of two results, in words."""
    want, have = dict(_tensors(name, expected)), dict(_tensors(name, got))
    if want.keys() != have.keys():
        changed = sorted(want.keys() ^ have.keys())
        return f"{changed[0]} is a tensor in one only"
    for key, tensor in want.items():
        other = have[key]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return (
                f"{key} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"not {other.dtype} {tuple(other.shape)}"
            )
        if tensor.is_floating_point():
            size = tensor.detach().abs().nan_to_num().max() if tensor.numel() else 0.0
            equal = torch.allclose(
                tensor, other, rtol=0.0, atol=float(tolerance * size), equal_nan=True
            )
        else:
            equal = torch.equal(tensor, other)
        if not equal:
            return f"{key} has other values"
    return None
