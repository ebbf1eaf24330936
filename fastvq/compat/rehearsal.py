"""A rehearsal: does an adapter compute what the module it stands in for computes?

Names and attributes say which class a module claims to be; a fork may keep them and compute
something else. So both run once on a small random batch, as float64 copies on the CPU, where
rounding moves neither an index nor a digit that counts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Far above the rounding of float64, and of modules that insist on float32; far below what another
# formula makes.
_TOLERANCE = 1e-5


def difference(
    host: nn.Module,
    adapter: nn.Module,
    make_probe: Callable[[Any], tuple[Any, ...]],
    fill: Callable[[Any], None],
) -> str | None:
    """How `adapter` differs from `host` on the arguments that `make_probe` gives; None if not.

    Compared are outputs in evaluation, then outputs, state and gradients of a training step.
    There is none where the host itself cannot take one, nor among several processes, where
    it could wait for the others. Neither module is changed, nor the random state.
    """
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = make_probe(host)
        try:
            copies = [_double_on_cpu(module) for module in (host, adapter)]
            for module in copies:
                torch.manual_seed(1)
                with torch.no_grad():
                    fill(module)
        except Exception as error:
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
            where = _compare("result", expected, got)
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


def _double_on_cpu(module: nn.Module) -> nn.Module:
    """A copy of `module` with all floating tensors in float64, on the CPU."""
    copies: dict[int, Any] = {}
    # Plain attributes too: a weight made by weight normalisation is one, and part of a graph.
    held = [value for part in module.modules() for value in part.__dict__.values()]
    tensors = [value for value in held if isinstance(value, Tensor)]
    for tensor in [*module.parameters(), *module.buffers(), *tensors]:
        double = tensor.detach().to("cpu", copy=True)
        double = double.double() if double.is_floating_point() else double
        if isinstance(tensor, nn.Parameter):
            double = nn.Parameter(double, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = double
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


def _compare(name: str, expected: Any, got: Any) -> str | None:
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
                tensor, other, rtol=0.0, atol=float(_TOLERANCE * size), equal_nan=True
            )
        else:
            equal = torch.equal(tensor, other)
        if not equal:
            return f"{key} has other values"
    return None
