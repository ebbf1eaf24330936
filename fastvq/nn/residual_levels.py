"""What every residual quantizer shares, whatever quantizes its levels.

Lives here: how many levels a training step runs (quantizer dropout), codes and outputs of given
indices, and several residual quantizers side by side on slices of the channels. What a level is,
and how one level's residual reaches the next, is `residual_vq.py`, `residual_fsq.py`,
`residual_lfq.py` and `residual_sim_vq.py`.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.ops.checks import check_int

# Seeds of quantizer dropout are below this, as in vector-quantize-pytorch.
_SEEDS = 10_000


def shared_seed(device: torch.device) -> int:
    """A random seed, the same on every process, from the global CPU generator."""
    seed = torch.randint(0, _SEEDS, ())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        seed = seed.to(device)
        dist.all_reduce(seed)
    return int(seed)


Level = TypeVar("Level", bound=nn.Module)


class ResidualLevels(nn.Module, abc.ABC, Generic[Level]):
    """Q quantizers in turn, each on what those before it left.

    With quantizer dropout a training step runs only the first n levels, where

        i ~ uniform {cutoff_index, …, Q−1},   n = i + 1 rounded up to a multiple of `multiple_of`

    and the indices of the others are −1, their losses 0. Zeghidour et al. 2021, arXiv:2107.03312,
    sec. III-C.
    """

    layers: nn.ModuleList  # of Q `Level`s

    def __init__(
        self,
        num_quantizers: int,
        quantize_dropout: bool,
        quantize_dropout_cutoff_index: int,
        quantize_dropout_multiple_of: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_int(name, "num_quantizers", num_quantizers)
        self.num_quantizers = num_quantizers
        self.quantize_dropout = bool(quantize_dropout) and num_quantizers > 1
        last = num_quantizers - 1 if self.quantize_dropout else quantize_dropout_cutoff_index
        if not 0 <= quantize_dropout_cutoff_index <= last:
            raise ValueError(
                f"{name}: quantize_dropout_cutoff_index must be in 0 … {num_quantizers - 1}; "
                f"got {quantize_dropout_cutoff_index}."
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(
                f"{name}: quantize_dropout_multiple_of must be at least 1; "
                f"got {quantize_dropout_multiple_of}."
            )
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    def _depth(self, seed: int | None, device: torch.device, dropout: bool) -> int:
        """How many levels this call runs; `seed` None draws one if it is needed."""
        if not (dropout and self.training and self.quantize_dropout):
            return self.num_quantizers
        drawn = random.Random(shared_seed(device) if seed is None else seed)
        last = drawn.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    def _layer(self, level: int) -> Level:
        return cast(Level, self.layers[level])

    @abc.abstractmethod
    def _level_codes(self, level: int, indices: Tensor) -> Tensor:
        """(…, d): what the level adds to the sum for these indices; zeros for −1."""

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(Q, B, …, d): the code of every level for indices (B, …, Q); zeros where −1.

        With quantizer dropout the last levels may be missing from the indices.
        """
        given = indices.shape[-1]
        if given > self.num_quantizers or (
            given < self.num_quantizers and not self.quantize_dropout
        ):
            raise ValueError(
                f"{type(self).__name__}.get_codes_from_indices: indices must have "
                f"{self.num_quantizers} levels in their last dimension (fewer only with "
                f"quantize_dropout=True); got {tuple(indices.shape)}."
            )
        indices = F.pad(indices, (0, self.num_quantizers - given), value=-1)
        levels = [self._level_codes(q, index) for q, index in enumerate(indices.unbind(dim=-1))]
        return torch.stack(levels)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the levels' codes for indices (B, …, Q), projected out where x is."""
        output: Tensor = self.get_codes_from_indices(indices).sum(dim=0)
        project_out = getattr(self, "project_out", None)
        if isinstance(project_out, nn.Linear):
            output = project_out(output.to(project_out.weight.dtype))
        return output


class ResidualGroups(nn.Module):
    """Residual quantizers side by side, each on its own slice of the channels.

    Every method takes and returns what its groups' does, with a leading dimension of groups on
    indices and losses, and with outputs joined along the channels. Quantizer dropout runs
    as many levels in every group. Yang et al. 2023, arXiv:2305.02765, sec. 3.
    """

    def __init__(
        self, make: Callable[[int], ResidualLevels], dim: int, groups: int, accept_image_fmap: bool
    ) -> None:
        """`make` makes a group's quantizer of so many channels."""
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(
                f"{type(self).__name__}: dim must be a multiple of groups; got {dim} and {groups}."
            )
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(make(dim // groups) for _ in range(groups))

    @property
    def codebooks(self) -> Tensor:
        """(groups, Q, K, d)."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])  # type: ignore[misc]

    @property
    def split_dim(self) -> int:
        """The dimension of x that holds the channels."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(groups, Q, B, …, d)."""
        return torch.stack(
            [rvq.get_codes_from_indices(each) for rvq, each in zip(self._levels(), indices)]
        )

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        outputs = [rvq.get_output_from_indices(each) for rvq, each in zip(self._levels(), indices)]
        return torch.cat(outputs, dim=self.split_dim)

    def _levels(self) -> list[ResidualLevels]:
        return list(self.rvqs)  # type: ignore[arg-type]

    def _each(self, x: Tensor, indices: Sequence[Tensor] | None = None, **kwargs: Any) -> list:
        """The results of every group, gathered by position."""
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x must have {self.dim} channels in dimension "
                f"{self.split_dim}; got {tuple(x.shape)}."
            )
        if self.training and self._levels()[0].quantize_dropout:
            kwargs["rand_quantize_dropout_fixed_seed"] = shared_seed(x.device)
        slices = x.chunk(self.groups, dim=self.split_dim)
        if indices is None:
            results = [rvq(part, **kwargs) for rvq, part in zip(self.rvqs, slices)]
        else:
            results = [
                rvq(part, indices=given, **kwargs)
                for rvq, part, given in zip(self.rvqs, slices, indices)
            ]
        return [list(position) for position in zip(*results)]

    def _joined(self, results: list, with_codes: bool) -> tuple:
        """Outputs joined, indices and losses stacked, and the groups' codes as they are."""
        quantized, *rest = results
        codes = (tuple(rest.pop()),) if with_codes else ()
        joined = torch.cat(quantized, dim=self.split_dim)
        return joined, *(torch.stack(each) for each in rest), *codes
