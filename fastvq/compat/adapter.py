"""What the adapters share: how a host class is described, and how its tensors are taken over.

A host is a module class of another library; an adapter is the class here that computes the same.
Which modules of a model are replaced, and the report of it, are `replace.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Adapter = TypeVar("Adapter", bound=nn.Module)

# Of nn.Module's own attributes, those that carry over; its hooks do not, so modules with hooks
# are never adapted.
_CARRIED = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Unsupported(Exception):
    """Why a module that was recognised has no adapter; the message is the reported reason."""


class Host(NamedTuple):
    """A class of another library that has an adapter, or is known to have none."""

    library: str  # as the report names it
    class_name: str
    modules: tuple[str, ...]  # ends of the import paths that define the class
    attributes: frozenset[str]  # what tells it from namesakes: attributes, buffers, submodules
    without: frozenset[str]  # attributes that a namesake has and it has not
    bypassed: tuple[str, ...]  # submodules that the adapter reads but never calls
    adapt: Callable[[Any], nn.Module]  # raises Unsupported
    probe: Callable[[Any], tuple[Any, ...]]  # CPU arguments for one small forward
    # Fills the codebook with random codes before a rehearsal, so that neither codes that are equal
    # nor a start still to come can make a difference.
    fill: Callable[[Any], None]
    dtype: torch.dtype = torch.float64  # of a rehearsal


def adopt(adapter_class: type[Adapter], host: nn.Module) -> Adapter:
    """An `adapter_class` that has all attributes of `host`, and its very tensors and submodules.

    Parameters stay the same objects, so an optimizer that holds them goes on working.
    """
    adapter = adapter_class.__new__(adapter_class)
    nn.Module.__init__(adapter)
    own = set(adapter.__dict__)
    for name, value in host.__dict__.items():
        if name in _CARRIED:
            adapter.__dict__[name] = copy.copy(value)
        elif name not in own:
            adapter.__dict__[name] = value
    return adapter


def check_embedding(embedding: nn.Module, num_codes: int, dim: int) -> None:
    """Unsupported unless `embedding` is a plain nn.Embedding (num_codes, dim)."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise Unsupported("its codebook is not a plain nn.Embedding")
    if embedding.weight.shape != (num_codes, dim):
        raise Unsupported(
            f"its codebook has shape {tuple(embedding.weight.shape)}, not ({num_codes}, {dim})"
        )
