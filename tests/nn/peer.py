"""Our quantizers beside those of vector-quantize-pytorch: same seeds, same inputs, same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

import fastvq

peer = pytest.importorskip("vector_quantize_pytorch")

U = UNIT_ROUNDOFF[torch.float32]


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs, made from one seed: the same state, which either loads from the other."""
    torch.manual_seed(0)
    ours = getattr(fastvq, name)(**options)
    torch.manual_seed(0)
    theirs = getattr(peer, name)(**options)
    assert_same_state(ours, theirs, terms=0)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    assert not any(theirs.load_state_dict(ours.state_dict()))
    return ours, theirs


def assert_same(ours: Tensor, theirs: Tensor, terms: int, magnitude: float | None = None) -> None:
    """Two float32 sums of at most `terms` terms: each errs by terms·u·Σ|terms|, at most.

    `magnitude` is that Σ|terms|, by default the largest result.
    """
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs)
        return
    largest = theirs.abs().max().item() if theirs.numel() else 0.0
    bound = 2 * terms * U * max(largest, magnitude or 0.0)
    assert (ours - theirs).abs().max().item() <= bound if ours.numel() else True


def assert_same_state(
    ours: nn.Module, theirs: nn.Module, terms: int, magnitude: float | None = None
) -> None:
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(yours)
    for key in mine:
        assert_same(mine[key], yours[key], terms, magnitude)


def _flat(outputs: tuple) -> tuple:
    """Tuples inside opened: grouped quantizers return one of codes."""
    return tuple(one for out in outputs for one in (out if isinstance(out, tuple) else (out,)))


def assert_same_step(
    ours: nn.Module,
    theirs: nn.Module,
    x: Tensor,
    terms: int,
    magnitude: float | None = None,
    **call: Any,
) -> tuple[Tensor, ...]:
    """One forward and backward of both from one seed; returns our outputs."""
    results = []
    for module in (ours, theirs):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(1)
        outputs = _flat(module(inputs, **call))
        floating = [out for out in outputs if out is not None and out.requires_grad]
        weights = torch.Generator().manual_seed(2)
        total = sum((out * torch.randn(out.shape, generator=weights)).sum() for out in floating)
        if floating:
            total.backward()
        results.append((outputs, inputs.grad, [p.grad for p in module.parameters()]))
    (mine, grad, grads), (yours, their_grad, their_grads) = results
    assert len(mine) == len(yours)
    for one, other in zip((*mine, grad, *grads), (*yours, their_grad, *their_grads)):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other, terms, magnitude)
    return mine
