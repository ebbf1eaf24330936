"""`HierarchicalPrior`: one `PixelCNN` per level of a VQ-VAE-2, each conditioned on those above.

What a single prior does lives in `pixelcnn`; the configurations of the papers in `presets`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvq import sampling
from fastvq.models.pixelcnn import PixelCNN, check_codes
from fastvq.models.pretrained import Pretrained
from fastvq.nn.dimensions import CONVOLUTIONS
from fastvq.nn.residual import ResidualStack

Value = TypeVar("Value")


def _per_level(name: str, value: Value | Sequence[Value], levels: int) -> list[Value]:
    """`value` once per level: a sequence must have one entry for each, anything else repeats."""
    if isinstance(value, (list, tuple)):
        if len(value) != levels:
            raise ValueError(
                f"HierarchicalPrior: {name} must be one value or {levels}, one per level; got "
                f"{len(value)}."
            )
        return list(value)
    return [value] * levels  # type: ignore[list-item]


def _dilations_per_level(
    dilations: Sequence[int] | Sequence[Sequence[int]], levels: int
) -> list[Sequence[int]]:
    """One sequence of dilations for all levels, or one per level."""
    if all(isinstance(dilation, int) for dilation in dilations):
        return [dilations] * levels  # type: ignore[list-item]
    return _per_level("dilations", list(dilations), levels)  # type: ignore[arg-type]


def _check_shapes(
    shapes: Sequence[Sequence[int]], levels: int | None = None, dimensions: int | None = None
) -> list[list[int]]:
    """Level shapes, top first, each a whole multiple of the one above it."""
    sizes = [list(shape) for shape in shapes]
    expected = (1, 2) if dimensions is None else (dimensions,)
    if (
        not sizes
        or len(sizes[0]) not in expected
        or any(len(shape) != len(sizes[0]) for shape in sizes)
        or not all(isinstance(size, int) and size >= 1 for shape in sizes for size in shape)
    ):
        names = " or ".join("(H, W)" if count == 2 else "(T,)" for count in reversed(expected))
        raise ValueError(
            f"HierarchicalPrior: shapes must be ({names} of the top level, …, of the bottom), "
            f"positive ints; got {shapes!r}."
        )
    if levels is not None and len(sizes) != levels:
        raise ValueError(
            f"HierarchicalPrior: shapes must have one per level ({levels}); got {len(sizes)}."
        )
    for upper, lower in itertools.pairwise(sizes):
        if any(below % above for above, below in zip(upper, lower)):
            raise ValueError(
                "HierarchicalPrior: each level's shape must be a whole multiple of the one above; "
                f"got {tuple(upper)} above {tuple(lower)}."
            )
    return sizes


class LevelConditioning(nn.Module):
    """Codes of the levels above → a condition map at this level's resolution.

        condition = ResidualStack(conv3×3(Σ_above upsample(embedding_above(codes_above))))

    upsample repeats each vector over the rectangle of this level's codes that lies under it. Over
    sequences (dimensions=1) the convolutions have 3 steps.

    Args:
        num_codes: of each level above, top first.
        channels: of the embeddings and of the map.
        num_blocks: residual blocks, see `ResidualStack`; 3×3 and 1×1 convolutions.
        dimensions: 2 for maps of codes, 1 for sequences.
    Razavi et al. 2019, arXiv:1906.00446, section 3.2: the residual conditioning stack.
    """

    def __init__(
        self, num_codes: Sequence[int], channels: int, num_blocks: int, dimensions: int = 2
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count, channels) for count in num_codes)
        self.conv = CONVOLUTIONS[dimensions](channels, channels, 3, padding=1)
        self.stack = ResidualStack(channels, channels, num_blocks, dimensions=dimensions)

    def forward(self, above: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """[(B, h, w) int64, …] top first → (B, channels, H, W); H and W multiples of h and w.

        Of sequences (B, t) and (B, channels, T), T a multiple of t.
        """
        total: Tensor | None = None
        for embedding, codes in zip(self.embeddings, above):
            spread = codes
            for axis, size in enumerate(shape, start=1):
                spread = spread.repeat_interleave(size // codes.shape[axis], dim=axis)
            embedded = embedding(spread)
            total = embedded if total is None else total + embedded
        assert total is not None
        condition: Tensor = self.stack(self.conv(total.movedim(-1, 1)))
        return condition


class HierarchicalPrior(Pretrained, nn.Module):
    """Autoregressive prior over the code maps of all levels, top first.

        log p(codes) = Σ_level log p(codes[level] | codes of all levels above)

    `levels[i]` is the `PixelCNN` of level i; `conditioning[i − 1]` the `LevelConditioning` that
    shows it the levels above. Every option after `shapes` except `num_classes` may be one value or
    a list with one per level (for `dilations`: one sequence, or one per level).

    Where the shapes are (T,) the codes of every level are sequences (B, T), and every (H, W) below
    is (T,).

    Args:
        num_codes: K of every level, or one per level.
        shapes: ((H, W) of the top level, …, of the bottom); each a whole multiple of the one
            above. They are the default of `sample`; `forward` takes any sizes with whole ratios.
        hidden_channels, num_layers, kernel_size, first_kernel_size, dilations, attention_every,
            attention_heads, dropout: as `PixelCNN`.
        num_classes: number of class labels, shown to every level, or None.
        condition_channels: channels of the maps that condition the levels below the top.
        conditioning_blocks: residual blocks of each map's network.
    Raises:
        ValueError: an argument outside these rules.
    Razavi et al. 2019, arXiv:1906.00446, section 3.2. There the top prior is a self-attention
    PixelSNAIL variant; here every level is a gated PixelCNN with optional attention.
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        shapes: Sequence[Sequence[int]],
        *,
        hidden_channels: int | Sequence[int] = 64,
        num_layers: int | Sequence[int] = 15,
        kernel_size: int | Sequence[int] = 3,
        first_kernel_size: int | Sequence[int | None] | None = None,
        dilations: Sequence[int] | Sequence[Sequence[int]] = (1,),
        attention_every: int | Sequence[int] = 0,
        attention_heads: int | Sequence[int] = 8,
        dropout: float | Sequence[float] = 0.0,
        num_classes: int | None = None,
        condition_channels: int | Sequence[int] = 64,
        conditioning_blocks: int | Sequence[int] = 2,
    ) -> None:
        super().__init__()
        self.shapes = _check_shapes(shapes)
        self.dimensions = len(self.shapes[0])
        count = len(self.shapes)
        self.num_codes = _per_level("num_codes", num_codes, count)
        channels = _per_level("condition_channels", condition_channels, count)
        blocks = _per_level("conditioning_blocks", conditioning_blocks, count)
        options: dict[str, list[Any]] = {
            "hidden_channels": _per_level("hidden_channels", hidden_channels, count),
            "num_layers": _per_level("num_layers", num_layers, count),
            "kernel_size": _per_level("kernel_size", kernel_size, count),
            "first_kernel_size": _per_level("first_kernel_size", first_kernel_size, count),
            "dilations": _dilations_per_level(dilations, count),
            "attention_every": _per_level("attention_every", attention_every, count),
            "attention_heads": _per_level("attention_heads", attention_heads, count),
            "dropout": _per_level("dropout", dropout, count),
        }
        self.levels = nn.ModuleList()
        self.conditioning = nn.ModuleList()
        for level in range(count):
            own: dict[str, Any] = {name: values[level] for name, values in options.items()}
            below_top = level > 0
            self.levels.append(
                PixelCNN(
                    self.num_codes[level],
                    num_classes=num_classes,
                    condition_channels=channels[level] if below_top else None,
                    dimensions=self.dimensions,
                    **own,
                )
            )
            if below_top:
                above = self.num_codes[:level]
                self.conditioning.append(
                    LevelConditioning(above, channels[level], blocks[level], self.dimensions)
                )

    @classmethod
    def for_model(
        cls, vqvae2: nn.Module, image_size: int | Sequence[int], **options: Any
    ) -> HierarchicalPrior:
        """A prior for the codes that a `VQVAE2` gives for pictures of `image_size`.

        Level i of n has maps of image_size / (downsample · 2^(n − 1 − i)).

        Args:
            vqvae2: a `VQVAE2` or `VQVAE`, whose `config` is read.
            image_size: pixels, H = W, or (H, W); of a model with dimensions=1 its length T.
            options: further arguments of the constructor.
        Raises:
            ValueError: image_size is not a multiple of the top level's downsampling.
        """
        config: dict[str, Any] = getattr(vqvae2, "config", {})
        if not {"downsample", "num_codes"} <= config.keys():
            raise TypeError(
                "HierarchicalPrior.for_model: vqvae2 must be a VQVAE2 or a VQVAE; got "
                f"{type(vqvae2).__name__}."
            )
        levels, downsample = config.get("levels", 1), config["downsample"]
        dimensions = config.get("dimensions", 2)
        size = (image_size,) * dimensions if isinstance(image_size, int) else tuple(image_size)
        factors = [downsample * 2 ** (levels - 1 - level) for level in range(levels)]
        if any(side % factors[0] for side in size):
            raise ValueError(
                f"HierarchicalPrior.for_model: image_size must be a multiple of {factors[0]}, the "
                f"top level's downsampling; got {image_size}."
            )
        shapes = [tuple(side // factor for side in size) for factor in factors]
        return cls(config["num_codes"], shapes, **options)

    def condition(self, codes: Sequence[Tensor], level: int, shape: Sequence[int]) -> Tensor:
        """The condition map (B, C, H, W) that the levels above `level` give it at `shape`."""
        condition: Tensor = self.conditioning[level - 1](codes[:level], shape)
        return condition

    def _check(self, codes: Sequence[Tensor]) -> None:
        if len(codes) != len(self.levels):
            raise ValueError(
                f"HierarchicalPrior: codes must be a list of {len(self.levels)} maps, top level "
                f"first; got {len(codes)}."
            )
        for level, (one, count) in enumerate(zip(codes, self.num_codes)):
            check_codes(one, count, f"codes[{level}]", self.dimensions)
            if len(one) != len(codes[0]):
                raise ValueError(
                    f"HierarchicalPrior: codes[{level}] must have batch {len(codes[0])}, as "
                    f"codes[0]; got {len(one)}."
                )
        _check_shapes([one.shape[1:] for one in codes])

    def _level_arguments(
        self, codes: Sequence[Tensor], class_labels: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """(codes, class_labels, condition) of each level's `PixelCNN`."""
        self._check(codes)
        arguments: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        for level, one in enumerate(codes):
            condition = self.condition(codes, level, one.shape[1:]) if level else None
            arguments.append((one, class_labels, condition))
        return arguments

    def forward(self, codes: Sequence[Tensor], class_labels: Tensor | None = None) -> list[Tensor]:
        """Logits of every level given its earlier codes and all levels above.

        Args:
            codes: one (B, H, W) int64 map per level, top first; shapes in whole ratios.
            class_labels: (B,) int64, exactly when built with `num_classes`.
        Returns:
            One (B, num_codes, H, W) per level.
        Raises:
            ValueError, TypeError: codes or labels break these rules.
        """
        arguments = self._level_arguments(codes, class_labels)
        return [prior(*own) for prior, own in zip(self.levels, arguments)]

    def code_log_prob(
        self, codes: Sequence[Tensor], class_labels: Tensor | None = None
    ) -> list[Tensor]:
        """log p of each code given those before it and all levels above, nats: one map per level.

        Arguments and errors as `forward`; the maps are as `codes`.
        """
        arguments = self._level_arguments(codes, class_labels)
        return [prior.code_log_prob(*own) for prior, own in zip(self._priors(), arguments)]

    def level_log_prob(self, codes: Sequence[Tensor], class_labels: Tensor | None = None) -> Tensor:
        """log p of each level's map given the levels above: (B, levels), nats. As `forward`."""
        maps = self.code_log_prob(codes, class_labels)
        return torch.stack([code_map.flatten(start_dim=1).sum(dim=1) for code_map in maps], dim=1)

    def log_prob(self, codes: Sequence[Tensor], class_labels: Tensor | None = None) -> Tensor:
        """log p of all levels' maps together: (B,), nats, summed over levels and positions."""
        return self.level_log_prob(codes, class_labels).sum(dim=1)

    def _priors(self) -> list[PixelCNN]:
        return [prior for prior in self.levels if isinstance(prior, PixelCNN)]

    def sample(
        self,
        n: int,
        *,
        class_labels: Tensor | int | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        given: Sequence[Tensor | None] | None = None,
        seed: int | None = None,
        method: str = "cached",
        progress: bool = False,
        shapes: Sequence[Sequence[int]] | None = None,
        first_sample: int = 0,
        verify: bool = False,
    ) -> list[Tensor]:
        """Draw the maps of all levels, top first, each level given those drawn above it.

        Args:
            n: number of samples.
            class_labels: (n,) int64, or one int for all.
            temperature, top_k, top_p: one value, or one per level; as `PixelCNN.sample`.
            given: one map per level (known codes, −1 elsewhere) or None for a level without any.
            seed, method, progress, first_sample, verify: as `PixelCNN.sample`. The condition maps
                are computed in float64 so that they, too, do not depend on the batch.
            shapes: (H, W) per level; None: the prior's own.
        Returns:
            One (n, H, W) int64 map per level.
        Raises:
            ValueError, TypeError, RuntimeError: as `PixelCNN.sample`.
        """
        count = len(self.levels)
        sizes = self.shapes
        if shapes is not None:
            sizes = _check_shapes(shapes, count, self.dimensions)
        temperatures = _per_level("temperature", temperature, count)
        top_ks = _per_level("top_k", top_k, count)
        top_ps = _per_level("top_p", top_p, count)
        known: list[Tensor | None] = [None] * count
        if given is not None:
            known = _per_level("given", list(given), count)
        seed = sampling.check_seed(seed)
        codes: list[Tensor] = []
        for level, prior in enumerate(self._priors()):
            codes.append(
                prior.sample(
                    sizes[level],
                    n,
                    class_labels=class_labels,
                    condition=self._sampling_condition(codes, level, sizes[level]),
                    temperature=temperatures[level],
                    top_k=top_ks[level],
                    top_p=top_ps[level],
                    given=known[level],
                    seed=seed,
                    method=method,
                    progress=progress,
                    first_sample=first_sample,
                    level=level,
                    verify=verify,
                )
            )
        return codes

    def _sampling_condition(
        self, codes: Sequence[Tensor], level: int, shape: Sequence[int]
    ) -> Tensor | None:
        """The float64 condition map of a level, (n, C, H, W); None for the top."""
        if level == 0:
            return None
        network = sampling.eval_copy(self.conditioning[level - 1], torch.float64)
        with torch.no_grad(), torch.autocast(codes[0].device.type, enabled=False):
            condition: Tensor = network(codes, shape)
        return condition
