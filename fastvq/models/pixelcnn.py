"""`PixelCNN`: an autoregressive prior over one map, or one sequence, of codes.

The layers live in `fastvq.nn`, the drawing of codes in `fastvq.sampling`, and the prior over
several maps of a VQ-VAE-2 in `hierarchical_prior`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq import sampling
from fastvq.models.pretrained import Pretrained
from fastvq.nn.causal_attention import CausalSelfAttention
from fastvq.nn.dimensions import CONVOLUTIONS, check_dimensions
from fastvq.nn.gated_causal_conv import GatedCausalConv1d
from fastvq.nn.gated_layer import GatedLayer
from fastvq.nn.gated_masked_conv import GatedMaskedConv2d
from fastvq.ops.checks import check_int


class ReceptiveField(NamedTuple):
    """How far a prediction can see: `rows` above, `columns` to each side; None is everything."""

    rows: int | None
    columns: int | None


def check_codes(
    codes: Tensor, num_codes: int, argument: str = "codes", dimensions: int = 2
) -> None:
    """Refuse what is not int64 codes in 0 … num_codes − 1, (B, H, W) or (B, T).

    The values are looked at in eager mode only: a compiled graph has nowhere to raise from.
    """
    if codes.dtype != torch.int64:
        raise TypeError(f"PixelCNN: {argument} must be int64; got {codes.dtype}.")
    if codes.dim() != 1 + dimensions or 0 in codes.shape[1:]:
        shape = "(B, H, W) with H and W" if dimensions == 2 else "(B, T) with T"
        raise ValueError(
            f"PixelCNN: {argument} must be {shape} at least 1; got {tuple(codes.shape)}."
        )
    if torch.compiler.is_compiling() or codes.device.type == "meta" or codes.numel() == 0:
        return
    low, high = (int(value) for value in codes.aminmax())
    if low == -1:
        raise ValueError(
            f"PixelCNN: {argument} must be in 0 … {num_codes - 1}; got -1, which a quantizer gives "
            "a row that holds NaN or Inf. Leave such pictures out."
        )
    if low < 0 or high >= num_codes:
        raise ValueError(
            f"PixelCNN: {argument} must be in 0 … {num_codes - 1}; got values from {low} to {high}."
        )


def check_class_labels(class_labels: Tensor | None, num_classes: int | None, batch: int) -> None:
    """Refuse labels that are missing, unasked for, of the wrong shape, or out of range."""
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(
                "PixelCNN: class_labels must be None for a prior built with num_classes=None; "
                "got labels. Build it with num_classes to use them."
            )
        return
    if class_labels is None:
        raise ValueError(
            f"PixelCNN: class_labels must be given to a prior built with num_classes="
            f"{num_classes}; got None."
        )
    if not isinstance(class_labels, Tensor):
        raise TypeError(
            f"PixelCNN: class_labels must be a torch.Tensor; got {type(class_labels).__name__}."
        )
    if class_labels.dtype != torch.int64:
        raise TypeError(f"PixelCNN: class_labels must be int64; got {class_labels.dtype}.")
    if tuple(class_labels.shape) != (batch,):
        raise ValueError(
            f"PixelCNN: class_labels must be ({batch},), one per map; got "
            f"{tuple(class_labels.shape)}."
        )
    if torch.compiler.is_compiling() or class_labels.device.type == "meta" or batch == 0:
        return
    low, high = (int(value) for value in class_labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"PixelCNN: class_labels must be in 0 … {num_classes - 1}; got values from {low} to "
            f"{high}."
        )


class PixelCNN(Pretrained, nn.Module):
    """Gated PixelCNN over a map of codes, with vertical and horizontal stacks; or over a sequence.

        log p(codes) = Σ_p log softmax(logits[:, p])[codes[p]],   logits[:, p] from codes before p

    in raster order. An embedding of the codes feeds one `GatedMaskedConv2d` of mask type "A", then
    num_layers − 1 of type "B", with causal self-attention after every `attention_every`-th layer,
    and a head of ReLU, 1×1, ReLU, 1×1. Layer i has dilation dilations[i mod len(dilations)],
    except that the first always has 1, so that the nearest codes are never skipped. With dilation
    1 throughout every earlier code within reach is seen: there is no blind spot.

    With dimensions=1 codes are sequences (B, T), the layers `GatedCausalConv1d`, the horizontal
    stack alone, and every (H, W) below is T. Such a prior without attention can also `stream`.

    Args:
        num_codes: K.
        hidden_channels: C of every layer.
        num_layers: gated layers, at least 1.
        kernel_size: odd, at least 3.
        num_classes: number of class labels, or None.
        condition_channels: channels of a condition map at the codes' resolution, or None.
        dilations: cycled over the layers.
        attention_every: attention after every n-th layer; 0 for none.
        attention_heads: heads of each; must divide hidden_channels where attention is used.
        dropout: on gated outputs and attention weights.
        first_kernel_size: of the first layer; None: `kernel_size`.
        dimensions: 2 for maps of codes, 1 for sequences.
    Raises:
        ValueError: an argument outside these rules.
    van den Oord et al. 2016, arXiv:1606.05328; attention as in arXiv:1712.09763 (PixelSNAIL) and
    arXiv:1906.00446 (VQ-VAE-2); sequences as in arXiv:1609.03499 (WaveNet).
    """

    def __init__(
        self,
        num_codes: int,
        hidden_channels: int = 64,
        num_layers: int = 15,
        kernel_size: int = 3,
        num_classes: int | None = None,
        condition_channels: int | None = None,
        dilations: Sequence[int] = (1,),
        attention_every: int = 0,
        attention_heads: int = 8,
        dropout: float = 0.0,
        first_kernel_size: int | None = None,
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        check_dimensions("PixelCNN", dimensions)
        for name, value, least in (
            ("num_codes", num_codes, 1),
            ("hidden_channels", hidden_channels, 1),
            ("num_layers", num_layers, 1),
            ("attention_every", attention_every, 0),
            ("len(dilations)", len(dilations), 1),
            ("num_classes", 1 if num_classes is None else num_classes, 1),
            ("condition_channels", 1 if condition_channels is None else condition_channels, 1),
        ):
            check_int("PixelCNN", name, value, least)
        self.num_codes = num_codes
        self.num_classes = num_classes
        self.condition_channels = condition_channels
        self.dimensions = dimensions
        self.embedding = nn.Embedding(num_codes, hidden_channels)
        self.layers = nn.ModuleList()
        gated = GatedMaskedConv2d if dimensions == 2 else GatedCausalConv1d
        for index in range(num_layers):
            first = index == 0
            self.layers.append(
                gated(
                    hidden_channels,
                    (first_kernel_size or kernel_size) if first else kernel_size,
                    "A" if first else "B",
                    1 if first else dilations[index % len(dilations)],
                    num_classes,
                    condition_channels,
                    dropout,
                )
            )
            if attention_every and (index + 1) % attention_every == 0:
                self.layers.append(
                    CausalSelfAttention(hidden_channels, attention_heads, dropout, dimensions)
                )
        conv = CONVOLUTIONS[dimensions]
        self.head = nn.Sequential(
            nn.ReLU(),
            conv(hidden_channels, hidden_channels, 1),
            nn.ReLU(),
            conv(hidden_channels, num_codes, 1),
        )

    @property
    def receptive_field(self) -> ReceptiveField:
        """The furthest row above and column to either side that a prediction can depend on.

        Of a sequence: no rows, and the furthest step back.
        """
        reach = 0
        for layer in self.layers:
            if isinstance(layer, CausalSelfAttention):
                return ReceptiveField(None, None)
            assert isinstance(layer, GatedLayer)
            reach += layer.dilation * (layer.kernel_size // 2)
        return ReceptiveField(reach if self.dimensions == 2 else 0, reach)

    def forward(
        self,
        codes: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Unnormalised log-probabilities of every code at every position, given the ones before.

        Args:
            codes: (B, H, W) int64 in 0 … num_codes − 1; any H and W from 1.
            class_labels: (B,) int64, exactly when the prior was built with `num_classes`.
            condition: (B, condition_channels, H, W) float, exactly when built with
                `condition_channels`.
        Returns:
            (B, num_codes, H, W) logits.
        Raises:
            ValueError: shapes or values outside these rules.
            TypeError: codes or labels that are not int64.
        """
        check_codes(codes, self.num_codes, dimensions=self.dimensions)
        return self.logits_from_embedding(
            self.embedding(codes).movedim(-1, 1), class_labels, condition
        )

    def logits_from_embedding(
        self,
        embedded: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """`forward` from embedded codes, (B, C, H, W), so that gradients can be traced to them."""
        batch, _, *shape = embedded.shape
        check_class_labels(class_labels, self.num_classes, batch)
        self._check_condition(condition, (batch, self.condition_channels, *shape))
        vertical = horizontal = embedded
        for layer in self.layers:
            if isinstance(layer, CausalSelfAttention):
                horizontal = layer(horizontal)
            elif isinstance(layer, GatedCausalConv1d):
                horizontal = layer(horizontal, class_labels, condition)
            else:
                vertical, horizontal = layer(vertical, horizontal, class_labels, condition)
        logits: Tensor = self.head(horizontal)
        return logits

    def _check_given_condition(self, condition: object) -> None:
        if (condition is None) != (self.condition_channels is None):
            raise ValueError(
                "PixelCNN: condition must be given exactly when the prior was built with "
                f"condition_channels; got condition {'None' if condition is None else 'given'} "
                f"with condition_channels={self.condition_channels}."
            )

    def _check_condition(self, condition: Tensor | None, expected: tuple[int | None, ...]) -> None:
        self._check_given_condition(condition)
        if condition is not None and tuple(condition.shape) != expected:
            raise ValueError(
                f"PixelCNN: condition must be {expected}, at the codes' resolution; got "
                f"{tuple(condition.shape)}."
            )

    def code_log_prob(
        self,
        codes: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each code given those before it: (B, H, W), nats, at least float32.

        Arguments and errors as `forward`.
        """
        logits = self(codes, class_labels, condition)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return -F.cross_entropy(logits, codes, reduction="none")

    def log_prob(
        self,
        codes: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each whole map: (B,), nats, summed over its positions.

        Arguments and errors as `forward`.
        """
        each = self.code_log_prob(codes, class_labels, condition)
        return each.sum(dim=tuple(range(1, each.dim())))

    def sample(
        self,
        shape: int | Sequence[int],
        n: int,
        *,
        class_labels: Tensor | int | None = None,
        condition: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        given: Tensor | None = None,
        seed: int | None = None,
        method: str = "cached",
        progress: bool = False,
        first_sample: int = 0,
        level: int = 0,
        verify: bool = False,
    ) -> Tensor:
        """Draw `n` maps of codes, without dropout, whether or not the prior is in training mode.

        Each code is drawn from softmax(logits / temperature), cut to its `top_k` likeliest codes
        and then to the fewest whose probabilities (renormalised) reach `top_p`. With one seed both
        methods, every batch size and every backend give the same codes (`fastvq.sampling.draw`
        says why); arithmetic is float32, or float64 for a float64 prior. A float64 copy of the
        prior is made when a draw is too close for float32 to decide.

        Args:
            shape: (H, W); of sequences T or (T,).
            n: number of maps.
            class_labels: (n,) int64, or one int for all.
            condition: (n, condition_channels, H, W) float.
            temperature: at least 0; 0 takes the likeliest code, whatever `top_k` and `top_p`.
            top_k: 1 … num_codes, or None.
            top_p: in (0, 1], or None.
            given: (n, H, W) or (H, W) int64: known codes, kept as they are, and −1 elsewhere. Each
                unknown code is drawn given the codes before it in raster order, known or drawn.
            seed: None takes one from torch's global generator.
            method: "cached" computes each feature once; "full" runs one whole forward per code.
            progress: show a bar with codes per second (needs tqdm).
            first_sample: index of the first map in the noise: n = 8 in one call and two calls of
                4 with first_sample 0 and 4 give the same maps.
            level: which level of a hierarchy this is, for the noise.
            verify: prove every code by one float64 forward of each map, and draw again what is not
                proven: the codes then rest on no stated tolerance. See `fastvq.sampling.proof`.
        Returns:
            (n, H, W) int64, on the prior's device.
        Raises:
            ValueError, TypeError: an argument breaks its rule; the message names it.
            RuntimeError: the prior's logits are not finite, or tqdm is missing.
        """
        sampling.check_method(method)
        request = self._request(
            shape,
            n,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            given=given,
            seed=seed,
            first_sample=first_sample,
            level=level,
            progress=progress,
            verify=verify,
        )
        labels = self._labels(class_labels, n)
        size = (request.height, request.width)
        self._check_condition(condition, (n, self.condition_channels, *size[-self.dimensions :]))
        if condition is not None:
            condition = condition.detach().to(request.device).reshape(*condition.shape[:2], *size)
        plan = self._plan() if method == "cached" else None
        model = self if self.dimensions == 2 else sampling.OneRow(self)
        codes = sampling.generate(model, plan, sampling.Conditioning(labels, condition), request)
        return codes if self.dimensions == 2 else codes[:, 0]

    def stream(
        self,
        n: int,
        *,
        class_labels: Tensor | int | None = None,
        condition: Callable[[int, int], Tensor] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        given: Tensor | None = None,
        seed: int | None = None,
        stretch: int = 64,
        first_sample: int = 0,
        level: int = 0,
    ) -> Iterator[Tensor]:
        """Draw `n` sequences without end, `stretch` codes at a time, in constant memory.

        What comes, put together, is what `sample` gives for as long a sequence, whatever
        `stretch` is. Only for dimensions=1 without attention.

        Args:
            n, class_labels, temperature, top_k, top_p, seed, first_sample, level: as `sample`.
            condition: called with (start, stop), gives the condition of these steps,
                (n, condition_channels, stop − start) float; also of earlier steps, as many as the
                receptive field, where a draw is computed again.
            given: (n, P) or (P,) int64: how the sequences begin, −1 where to be drawn.
            stretch: codes at a time; the first ones are those of `given`.
        Returns:
            An endless iterator over (n, stretch) int64, on the prior's device.
        Raises:
            ValueError, TypeError, RuntimeError: as `sample`; a prior over maps, or with attention.
        """
        if self.dimensions != 1:
            raise ValueError(
                "PixelCNN.stream: dimensions must be 1, a prior over sequences; this one is over "
                "maps. Use sample."
            )
        length = stretch if given is None else max(given.shape[-1], 1)
        prefix = self._request(
            length,
            n,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            given=given if given is None or given.numel() else None,
            seed=seed,
            first_sample=first_sample,
            level=level,
            progress=False,
            verify=False,
        )
        width = sampling.check_shape(stretch, 1)[0]
        request = dataclasses.replace(prefix, width=width, given=None)
        begun = prefix.given
        if begun is None:
            begun = torch.empty(n, 0, dtype=torch.int64, device=prefix.device)
        labels = self._labels(class_labels, n)
        self._check_given_condition(condition)

        def condition_of(start: int, stop: int) -> Tensor:
            assert condition is not None
            told = condition(start, stop)
            self._check_condition(told, (n, self.condition_channels, stop - start))
            return told.detach().to(prefix.device)

        return sampling.stream(
            sampling.OneRow(self),
            self._plan(),
            labels,
            None if condition is None else condition_of,
            begun.reshape(n, -1) if n else begun,
            request,
        )

    def _request(self, shape: int | Sequence[int], n: int, **options: Any) -> sampling.Request:
        return sampling.make_request(
            shape,
            n,
            dimensions=self.dimensions,
            num_codes=self.num_codes,
            device=self.embedding.weight.device,
            **options,
        )

    def _labels(self, class_labels: Tensor | int | None, n: int) -> Tensor | None:
        """Checked labels on the prior's device, one for each of n samples."""
        if isinstance(class_labels, int):
            class_labels = torch.full((n,), class_labels)
        check_class_labels(class_labels, self.num_classes, n)
        return None if class_labels is None else class_labels.to(self.embedding.weight.device)

    def _plan(self) -> sampling.PriorPlan:
        """The weights as the cached method reads them."""
        dtype = sampling.working_dtype(self.embedding.weight)
        head = (self.head[1], self.head[3])
        return sampling.plan_prior(self.embedding, self.layers, head, dtype)
