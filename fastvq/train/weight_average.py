"""`WeightAverage`: an exponential moving average of a model's parameters.

It is what a prior is validated and sampled with. Codebooks that follow their data by moving
averages are another matter, in `fastvq.nn.codebook`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages θ̄ of a model's parameters θ, in float32.

        θ̄ ← θ̄ + (1 − γ_t)(θ − θ̄),   γ_t = min(decay, (1 + t) / (10 + t))

    after update t = 0, 1, …: the average forgets its start early on, and reaches `decay` after
    some 10 / (1 − decay) updates. t is the step of the run, so a resumed run goes on exactly.

    Args:
        model: whose parameters are averaged; buffers are not.
        decay: in [0, 1).
    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"WeightAverage: decay must be in [0, 1); got {decay}.")
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: parameter.detach().float().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the present parameters in, as of update `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), parameters, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the averages; afterwards its own weights, untouched."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._averages[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the parameters' names."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: other names than this model's parameters.
        """
        if state.keys() != self._averages.keys():
            odd = sorted(state.keys() ^ self._averages.keys())
            raise ValueError(
                f"WeightAverage: state must have the model's parameters; {odd[0]!r} differs."
            )
        for name, average in self._averages.items():
            average.copy_(state[name])
