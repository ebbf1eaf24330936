"""Plots of the records as SVG, each with a digest of what it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .gpu_tables import sizes
from .tables import THREADS, Record, described, headlines

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
# Points of one curve: (label of the panel, candidate, xs, ys).
Curve = tuple[str, str, list[float], list[float]]
_COLOURS = {
    "fastvq": "#d62728",
    "FAISS IndexFlatL2": "#1f77b4",
    "vector-quantize-pytorch": "#2ca02c",
    "scikit-learn argmin": "#9467bd",
    "PyKeOps argmin": "#17becf",
    "torch.cdist + argmin": "#8c564b",
    "torch.cdist + argmin, compiled": "#e377c2",
    "blocks of rows, compiled": "#ff7f0e",
    "one-hot quantizer": "#7f7f7f",
}
_OTHER_COLOURS = ("#bcbd22", "#aec7e8", "#ffbb78", "#98df8a", "#c5b0d5", "#c49c94", "#444444")


def data(found: list[Record], baseline: dict[str, Any]) -> dict[str, Any]:
    """What each plot shows, by the name of its file."""
    return {
        "speed-cpu.svg": [
            [
                f"{one.what}: {described(one.record)}",
                {who.removesuffix(", eval"): time / one.ours for who, time in one.rivals.items()},
            ]
            for one in headlines(found)
        ],
        "scale-search.svg": _search_curves(found),
        "scale-more.svg": [*_step_curves(found), *_memory_curves(found), *_process_curves(found)],
        "speed-gpu-predicted.svg": sizes(baseline),
    }


def digest(shown: Any) -> str:
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def up_to_date(name: str, shown: Any, folder: Path = FOLDER) -> bool:
    """Whether the file shows exactly this."""
    path = folder / name
    return path.is_file() and digest(shown) in path.read_text(encoding="utf-8")


def draw_all(found: list[Record], baseline: dict[str, Any], folder: Path = FOLDER) -> list[Path]:
    """Draw what has data and is not drawn yet; returns the files written."""
    drawers: dict[str, Callable[[Any, Any], None]] = {
        "speed-cpu.svg": _draw_ratios,
        "scale-search.svg": _draw_curves,
        "scale-more.svg": _draw_curves,
        "speed-gpu-predicted.svg": _draw_predictions,
    }
    written = []
    for name, shown in data(found, baseline).items():
        if shown and not up_to_date(name, shown, folder):
            _save(folder / name, drawers[name], shown)
            written.append(folder / name)
    return written


def _save(path: Path, draw: Callable[[Any, Any], None], shown: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "fastvq", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(layout="constrained")
        draw(figure, shown)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Description": f"data {digest(shown)}"}
        figure.savefig(path, format="svg", metadata=metadata)
    # Matplotlib ends lines of paths with blanks.
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(one.rstrip() for one in text.splitlines()) + "\n", encoding="utf-8")


def _colour(who: str) -> str:
    known = [name for name in _COLOURS if who.startswith(name)]
    if known:
        return _COLOURS[max(known, key=len)]
    return _OTHER_COLOURS[sum(map(ord, who)) % len(_OTHER_COLOURS)]


def _draw_ratios(figure: Any, shown: list[tuple[str, dict[str, float]]]) -> None:
    figure.set_size_inches(9, 0.8 + 0.32 * len(shown))
    axes = figure.add_subplot()
    for height, (_, ratios) in enumerate(reversed(shown)):
        for who, ratio in ratios.items():
            axes.plot(ratio, height, "o", color=_colour(who), label=who, markersize=6)
    axes.axvline(1.0, color=_COLOURS["fastvq"], label="fastvq")
    axes.set_yticks(range(len(shown)), [label for label, _ in reversed(shown)])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel("time as a multiple of fastvq's; left of the line a rival is faster")
    axes.grid(axis="x", which="both", alpha=0.3)
    _legend(figure, axes)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=4, frameon=False)


def _search_curves(found: list[Record]) -> list[Curve]:
    curves: list[Curve] = []
    for axis in ("N", "K", "D", "threads"):
        shown = [
            one
            for one in found
            if one["suite"] == "search_scale"
            and one["case"]["along"] == axis
            and one["threads"] == THREADS
        ]
        curves += _curves(f"ms against {axis}", shown, axis, _median)
    return curves


def _step_curves(found: list[Record]) -> list[Curve]:
    shown = [one for one in found if one["suite"] == "step_scale" and one["threads"] == THREADS]
    return _curves("ms per VQ-VAE step against the batch", shown, "B", _median)


def _memory_curves(found: list[Record]) -> list[Curve]:
    shown = [one for one in found if one["suite"] == "search_memory"]

    def mebibytes(record: Record, who: str) -> float:
        # Below a page the mark does not move; a log axis has no zero.
        return max(record["peak_bytes"][who] or 0, 4096) / 2**20

    return _curves("peak MiB of the search against K", shown, "K", mebibytes)


def _process_curves(found: list[Record]) -> list[Curve]:
    shown = [one for one in found if one["suite"] == "processes"]
    curves: list[Curve] = []
    for size in dict.fromkeys((one["case"]["K"], one["case"]["D"]) for one in shown):
        same = [one for one in shown if (one["case"]["K"], one["case"]["D"]) == size]
        title = f"statistics, ms against processes (K={size[0]}, D={size[1]})"
        curves += _curves(title, same, "processes", _median)
    return curves


def _median(record: Record, who: str) -> float:
    return float(record["timings"][who]["p50"])


def _curves(
    panel: str, shown: list[Record], axis: str, value: Callable[[Record, str], float]
) -> list[Curve]:
    ordered = sorted(shown, key=lambda record: record["case"][axis])
    curves: list[Curve] = []
    for who in dict.fromkeys(name for record in ordered for name in record["timings"]):
        having = [record for record in ordered if who in record["timings"]]
        xs = [float(record["case"][axis]) for record in having]
        curves.append((panel, who, xs, [value(record, who) for record in having]))
    return curves


def _draw_curves(figure: Any, shown: list[Curve]) -> None:
    panels = list(dict.fromkeys(curve[0] for curve in shown))
    rows = -(-len(panels) // 2)
    figure.set_size_inches(9, 0.6 + 3.0 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for panel, axes in zip(panels, grid):
        for _, who, xs, ys in (curve for curve in shown if curve[0] == panel):
            axes.plot(xs, ys, "o-", color=_colour(who), label=who, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(panel)
        axes.grid(which="both", alpha=0.3)
        axes.legend(fontsize=7, frameon=False)


def _draw_predictions(figure: Any, shown: list[dict[str, Any]]) -> None:
    figure.set_size_inches(9, 3.2)
    axes = figure.add_subplot()
    for offset, (name, label, colour) in enumerate(
        (
            ("floor_us", "floor", "#bbbbbb"),
            ("predicted_us", "predicted, plain kernel", "#d62728"),
            ("hopper_us", "predicted, warp-specialised kernel (opt-in)", "#ff9896"),
        )
    ):
        places = [number + 0.27 * (offset - 1) for number in range(len(shown))]
        axes.bar(places, [one[name] or 0 for one in shown], 0.25, color=colour, label=label)
    axes.set_xticks(range(len(shown)), [one["size"] for one in shown])
    axes.set_yscale("log")
    axes.set_ylabel("µs on an H200")
    axes.set_title("nearest code, predicted from machine code, not measured")
    axes.grid(axis="y", alpha=0.3)
    _legend(figure, axes)
