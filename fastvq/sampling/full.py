"""The plain method, one whole forward for every code: what `cached` must equal."""

from __future__ import annotations

from torch import Tensor, nn

from fastvq.sampling.request import Conditioning


class FullExecutor:
    """Logits of one position at a time from the model's own forward.

    Args:
        model: called as `model(codes, class_labels, condition)`, in eval mode.
        conditioning: class labels and map of every sample; the map in the model's dtype.
    """

    def __init__(self, model: nn.Module, conditioning: Conditioning) -> None:
        self._model = model
        self._conditioning = conditioning

    def step(self, codes: Tensor, row: int, column: int, want_logits: bool) -> Tensor | None:
        """Logits (n, K) at (row, column) given the codes before it, or None where not wanted.

        Args:
            codes: (n, H, W) int64; whatever stands at or after the position is not seen.
        """
        if not want_logits:
            return None
        logits = self._model(
            codes.clamp(min=0), self._conditioning.class_labels, self._conditioning.condition
        )
        return logits[:, :, row, column]
