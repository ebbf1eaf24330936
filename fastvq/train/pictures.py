"""What training and the command line draw: grids, reconstructions, curves, histograms.

All are PNG files, written under a temporary name and moved into place. What is shown in them, and
when, is decided elsewhere (the training loops, `showing`). Pillow draws the grids, matplotlib the
curves; each is imported where it is used.
"""

from __future__ import annotations

import io
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvq.models.pretrained import replace_file

_GAP = 2  # pixels between pictures
_TEXT = 13  # pixels, the height of a label
_LEAST_SIDE = 64  # pictures smaller than this are enlarged


def save_grid(
    pictures: Tensor,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
) -> Path:
    """Write pictures as one PNG, row after row.

    Args:
        pictures: (B, C, H, W) float, B ≥ 1, C = 1 or 3, clamped to 0…1; NaN shows as black.
        path: of the PNG; its folder is made if missing.
        labels: one per row, written to its left, or one per picture, written under it.
        column_labels: one per column, written above it.
        columns: pictures in a row; None: about as many as there are rows.
        scale: each pixel becomes scale × scale; None: enough for sides of about 64.
    Returns:
        The path.
    Raises:
        TypeError: `pictures` is not a floating-point tensor.
        ValueError: a shape, or a number of labels, outside these rules.
    """
    tiles = _tiles(pictures, scale)
    count = len(tiles)
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if columns < 1:
        raise ValueError(f"save_grid: columns must be at least 1; got {columns}.")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    if labels is not None and len(labels) not in (rows, count):
        raise ValueError(
            f"save_grid: labels must be {rows}, one per row, or {count}, one per picture; got "
            f"{len(labels)}."
        )
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(
            f"save_grid: column_labels must be {columns}, one per column; got {len(column_labels)}."
        )
    by_row = labels is not None and len(labels) == rows
    return _draw(
        tiles,
        Path(path),
        (rows, columns),
        above=list(column_labels or []),
        left=list(labels or []) if by_row else [],
        below=[] if by_row else list(labels or []),
    )


def level_names(levels: int) -> list[str]:
    """What the top 1, 2, … `levels` levels of codes are called together in pictures.

    1: ["all"]; 2: ["top only", "all"]; 3: ["top only", "top + next", "all"]; further levels are
    counted: "top + next 2".
    """
    between = [f"top + next {below}" if below > 1 else "top + next" for below in range(1, levels)]
    return [*["top only", *between][: levels - 1], "all"]


@torch.no_grad()
def reconstructions(model: nn.Module, pictures: Tensor) -> list[Tensor]:
    """Pictures decoded from what a model keeps of them, each (B, C, H, W).

    For a `VQVAE` or `VQVAE2`: from the codes of the top 1, 2, … all levels. For a `VAE`: one, from
    the mean of q(z|x).
    """
    if hasattr(model, "decode_codes"):
        codes = model.encode(pictures)  # type: ignore[operator]
        decode: Any = model.decode_codes
        return [decode(codes, levels=used) for used in range(1, len(codes) + 1)]
    posterior = model.encode(pictures)  # type: ignore[operator]
    return [model.decode(posterior.mean)]  # type: ignore[operator]


def save_reconstructions(
    model: nn.Module, pictures: Tensor, path: str | os.PathLike[str], *, scale: int | None = None
) -> Path:
    """Write what a model reconstructs beside the originals, as one PNG.

    A VAE gives two rows, originals above reconstructions. A VQ-VAE gives a row per picture, with
    columns "original", "top only", "top + next", … "all": decoded from the top levels alone, as in
    Razavi et al. 2019, arXiv:1906.00446, figure 3.

    Args:
        model: a `VAE`, `VQVAE` or `VQVAE2`; used as it is, so put it in eval mode first.
        pictures: (B, C, H, W) float 0…1, on the model's device.
        path: of the PNG.
        scale: as `save_grid`.
    """
    shown = [pictures, *reconstructions(model, pictures)]
    if not hasattr(model, "decode_codes"):
        return save_grid(
            torch.cat(shown),
            path,
            labels=["original", "reconstruction"],
            columns=len(pictures),
            scale=scale,
        )
    names = level_names(len(shown) - 1) if len(shown) > 2 else ["reconstruction"]
    return save_grid(
        torch.stack(shown, dim=1).flatten(0, 1),
        path,
        column_labels=["original", *names],
        columns=len(shown),
        scale=scale,
    )


def save_curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path | None:
    """Write the metrics of a run against the step, as one PNG; one panel per kind of metric.

    Args:
        metrics: rows as a run keeps them, each with "step" and numbers or lists of numbers (one
            per level); a row may lack any of them.
        path: of the PNG.
    Returns:
        The path, or None, and no file, where no row holds a number to draw.
    Raises:
        RuntimeError: matplotlib is not installed.
    """
    curves = _curves(metrics)
    panels = [name for name in _PANELS if any(_panel(key) == name for key in curves)]
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for axis, name in zip(axes, panels):
        for key, (steps, values) in curves.items():
            if _panel(key) == name:
                marker = "o" if len(steps) < 30 else None
                axis.plot(steps, values, label=key, marker=marker, markersize=3, linewidth=1.2)
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        drawn = [v for k, (_, own) in curves.items() if _panel(k) == name for v in own]
        positive = [value for value in drawn if value > 0]
        wide = bool(positive) and min(drawn) >= 0 and max(positive) > 20 * min(positive)
        if name in ("loss", "mean squared error") and wide:
            axis.set_yscale("log")  # zeros, such as the codebook loss of an EMA codebook, go
        if name == "usage":
            axis.set_ylim(0.0, 1.05)
    return _save_figure(figure, path)


def save_histogram(
    groups: Mapping[str, NDArray[np.float64]],
    path: str | os.PathLike[str],
    *,
    threshold: float,
    label: str,
) -> Path:
    """Write how often each score occurs in some groups of items, as one PNG with one panel.

    Args:
        groups: the scores of each group, by its name in the legend; drawn as shares of the group.
        path: of the PNG.
        threshold: marked by a vertical line.
        label: what the score is, below its axis; shown between the 0.5 and 99.5 % quantiles of
            all scores, the rest counting at the ends.
    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure, (axis,) = _figure(1)
    ends = np.quantile(np.concatenate([*groups.values(), [threshold]]), [0.005, 0.995])
    low, high = min(ends[0], threshold), max(ends[1], threshold)
    edges = np.linspace(low, high if high > low else low + 1.0, 61)
    for name, scores in groups.items():
        weights = np.full(len(scores), 1.0 / max(len(scores), 1))
        clipped = scores.clip(edges[0], edges[-1])
        axis.hist(clipped, edges, weights=weights, alpha=0.55, label=f"{name} ({len(scores)})")
    axis.axvline(threshold, color="black", linewidth=1.2, label=f"threshold {threshold:.4g}")
    axis.set_xlabel(label)
    axis.set_ylabel("share of the group")
    axis.legend(fontsize=8)
    return _save_figure(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    """A matplotlib figure of panels one above the other, and their axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            'curves and histograms: matplotlib is not installed: pip install "fastvq[train]".'
        ) from error
    figure = Figure(figsize=(7, 3 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(panels, 1, squeeze=False)[:, 0]


def _save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _write(Path(path), buffer.getvalue())


_PANELS = (
    *("loss", "mean squared error", "PSNR, dB", "nats", "nats per code", "bits per dimension"),
    *("perplexity", "usage"),
)


def _panel(key: str) -> str | None:
    """The panel a metric is drawn in, by its name; None where it is not drawn."""
    name = key.lower()
    for part, panel in (
        ("perplexity", "perplexity"),
        ("usage", "usage"),
        ("bits_per_dim", "bits per dimension"),
        ("nats_per_code", "nats per code"),
        ("nats", "nats"),
        ("elbo", "nats"),
        ("kl", "nats"),
        ("mse", "mean squared error"),
        ("psnr", "PSNR, dB"),
        ("loss", "loss"),
    ):
        if part in name:
            return panel
    return None


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """(steps, values) of every finite metric that has a panel; lists become "name[i]"."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in metrics:
        for key, entry in row.items():
            if _panel(key) is None or "step" not in row:
                continue
            several = isinstance(entry, (list, tuple))
            for index, value in enumerate(entry if several else [entry]):
                if isinstance(value, numbers.Real) and math.isfinite(value):
                    name = f"{key}[{index}]" if several and len(entry) > 1 else key
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return curves


def _tiles(pictures: Tensor, scale: int | None) -> NDArray[np.uint8]:
    """(B, H, W, 3) uint8, enlarged."""
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point():
        got = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
        raise TypeError(f"save_grid: pictures must be a float tensor in 0…1; got {got}.")
    if pictures.dim() != 4 or pictures.shape[1] not in (1, 3) or 0 in pictures.shape:
        raise ValueError(
            "save_grid: pictures must be (B, C, H, W) with C = 1 or 3 and none of them 0; got "
            f"{tuple(pictures.shape)}."
        )
    if scale is None:
        scale = max(1, round(_LEAST_SIDE / max(pictures.shape[2:])))
    if scale < 1:
        raise ValueError(f"save_grid: scale must be at least 1; got {scale}.")
    values = pictures.detach().float().cpu().nan_to_num(nan=0.0).clamp(0.0, 1.0)
    array = (values * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    return np.broadcast_to(array, (*array.shape[:3], 3))


def _draw(
    tiles: NDArray[np.uint8],
    path: Path,
    grid: tuple[int, int],
    *,
    above: list[str],
    left: list[str],
    below: list[str],
) -> Path:
    """Paste the tiles on white and write the labels around them."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise RuntimeError(
            'save_grid: Pillow is not installed: pip install "fastvq[train]".'
        ) from error
    rows, columns = grid
    height, width = tiles.shape[1:3]
    font = ImageFont.load_default(_TEXT)
    line = _TEXT + 6
    # A label under or above a picture may be wider than the picture: the column then grows.
    longest = max((math.ceil(font.getlength(text)) for text in [*above, *below]), default=0)
    step_x = max(width, longest + 4) + _GAP
    step_y = height + (line if below else 0) + _GAP
    margin = max((math.ceil(font.getlength(text)) + 10 for text in left), default=0)
    header = line if above else 0
    canvas = Image.new("RGB", (margin + columns * step_x + _GAP, header + rows * step_y + _GAP))
    canvas.paste((255, 255, 255), (0, 0, *canvas.size))
    pen = ImageDraw.Draw(canvas)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x = margin + _GAP + column * step_x + (step_x - _GAP - width) // 2
        y = header + _GAP + row * step_y
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
        if below:
            pen.text((x + width // 2, y + height + 2), below[index], "black", font, anchor="ma")
    for column, text in enumerate(above):
        centre = margin + _GAP + column * step_x + (step_x - _GAP) // 2
        pen.text((centre, 2), text, "black", font, anchor="ma")
    for row, text in enumerate(left):
        middle = header + _GAP + row * step_y + height // 2
        pen.text((margin - 4, middle), text, "black", font, anchor="rm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> Path:
    """Write a file so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: Path(temporary).write_bytes(content))
    return path
