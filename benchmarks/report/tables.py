"""Records as Markdown: the README's table, and a table per suite for docs/benchmarks.md."""

from __future__ import annotations

from typing import Any, NamedTuple

Record = dict[str, Any]
# Lines of the README's table: what it says, the suite, and which case.
HEADLINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("nearest code", "nearest_code", {"N": 32768, "K": 512, "D": 64}),
    ("nearest code", "nearest_code", {"N": 16384, "K": 8192, "D": 256}),
    ("nearest code", "nearest_code", {"N": 16384, "K": 4096, "D": 32}),
    ("nearest code", "nearest_code", {"N": 65536, "K": 1024, "D": 8}),
    ("training step", "vector_quantize", {"N": 32768, "K": 512, "D": 64}),
    ("training step", "vector_quantize", {"N": 16384, "K": 8192, "D": 256}),
    ("training step", "vector_quantize", {"N": 64, "K": 64, "D": 16}),
    ("statistics", "code_statistics", {"N": 32768, "K": 512, "D": 64, "skew": 0.5}),
    ("statistics", "code_statistics", {"N": 16384, "K": 8192, "D": 256, "skew": 0.0}),
    ("ResidualVQ, a step", "quantizers", {"module": "ResidualVQ", "B": 4, "N": 1024}),
    ("FSQ, a step", "quantizers", {"module": "FSQ", "B": 4, "N": 1024}),
    ("VQ-VAE, a whole step", "stage1_step", {"model": "vqvae", "K": 512}),
    ("VQ-VAE, a whole step", "stage1_step", {"model": "vqvae", "K": 8192}),
    ("VQ-VAE-2, a whole step", "stage1_step", {"model": "vqvae2", "K": 512}),
)
THREADS = 2
LUCIDRAINS = "vector-quantize-pytorch"


class Line(NamedTuple):
    """A record, read: medians in ms."""

    what: str
    record: Record
    ours: float
    rivals: dict[str, float]

    @property
    def best(self) -> str:
        return min(self.rivals, key=lambda who: self.rivals[who])

    @property
    def command(self) -> str:
        return f"fastvq bench {self.record['suite']} --case {described(self.record, ',')}"


def described(record: Record, separator: str = ", ") -> str:
    return separator.join(f"{key}={value}" for key, value in record["case"].items())


def line(what: str, record: Record) -> Line | None:
    """None where no rival has a time."""
    medians = {who: timing["p50"] for who, timing in record["timings"].items()}
    # The first candidate is what others are compared with; what else is ours is no rival.
    ours = next(iter(medians.values()))
    rivals = {who: time for who, time in medians.items() if not who.startswith("fastvq")}
    if record["suite"] == "vector_quantize":
        ours = medians["fastvq.VectorQuantize"]
    return Line(what, record, ours, rivals) if rivals else None


def headlines(found: list[Record]) -> list[Line]:
    """The lines of the README's table that have a record."""
    lines = []
    for what, suite, wanted in HEADLINES:
        for record in _of(found, suite, THREADS, "warm"):
            if wanted.items() <= record["case"].items() and (one := line(what, record)):
                lines.append(one)
    return lines


def _of(found: list[Record], suite: str, threads: int, cache: str) -> list[Record]:
    wanted = (suite, threads, cache)
    return [one for one in found if (one["suite"], one["threads"], one["cache"]) == wanted]


def cpu_table(found: list[Record]) -> str:
    """The README's table, what it was measured on, and where we lose."""
    lines = headlines(found)
    rows = [
        [
            f"{one.what}<br>{described(one.record)}",
            milliseconds(one.ours),
            _against(one, one.best) + f"<br>{one.best}",
            _lucidrains(one),
            _percent(one.record.get("fraction", {})),
            _memory(one.record, one.best),
            f"`{one.command}`",
        ]
        for one in lines
    ]
    head = [
        *("what", "fastvq, ms", "strongest rival, ms", LUCIDRAINS + ", ms"),
        *("of the roofline", "peak MiB, ours / rival's", "command"),
    ]
    return "\n\n".join([_circumstances(lines), table(head, rows), slower(found)])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def _against(one: Line, rival: str) -> str:
    ratio = one.rivals[rival] / one.ours
    text = f"{milliseconds(one.rivals[rival])} ({times(ratio)})"
    return f"**{text}**" if ratio < 1 else text


def _lucidrains(one: Line) -> str:
    found = [who for who in one.rivals if who.startswith(LUCIDRAINS)]
    return _against(one, found[0]) if found else "–"


def _percent(fractions: dict[str, float]) -> str:
    return f"{100 * next(iter(fractions.values())):.0f} %" if fractions else "–"


def _memory(record: Record, rival: str) -> str:
    peaks = record.get("peak_bytes", {})
    pair = [next(iter(peaks.values()), None), peaks.get(rival)]
    return " / ".join("–" if peak is None else f"{peak / 2**20:.1f}" for peak in pair)


def _circumstances(lines: list[Line]) -> str:
    """Machine, dates, versions and commits of the records shown."""
    if not lines:
        return "No record yet: `python -m benchmarks.record` makes them."
    shown = [one.record for one in lines]
    machine, versions = shown[-1]["machine"], shown[-1]["versions"]
    dates = sorted({record["time"][:10] for record in shown})
    commits = sorted(
        {(record["commit"] or "none")[:10] + " (dirty)" * bool(record["dirty"]) for record in shown}
    )
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; "
        f"{shown[-1]['threads']} threads for every library, {shown[-1]['cache']} cache; "
        f"{' and '.join(dates)}; {packages}; commit {', '.join(commits)}."
    )


def slower(found: list[Record]) -> str:
    """Every case with a rival faster than we are."""
    lost = [
        one
        for record in found
        if record["suite"] != "search_memory" and (one := line(record["suite"], record))
        if one.rivals[one.best] < one.ours
    ]
    if not lost:
        return "No rival was faster at any recorded case."
    rows = [
        [
            one.what,
            described(one.record),
            f"{one.record['threads']}, {one.record['cache']}",
            milliseconds(one.ours),
            _against(one, one.best),
            one.best,
        ]
        for one in sorted(lost, key=lambda one: one.rivals[one.best] / one.ours)
    ]
    head = ["suite", "case", "threads, cache", "fastvq, ms", "rival, ms", "rival"]
    return "Where a rival is faster, all cases recorded:\n\n" + table(head, rows)


def suite_tables(found: list[Record]) -> str:
    """Every suite's records: medians of all candidates, and their multiples of ours."""
    parts = []
    for suite in dict.fromkeys(record["suite"] for record in found):
        for threads, cache in sorted(
            {(r["threads"], r["cache"]) for r in found if r["suite"] == suite}
        ):
            parts.append(_suite_table(suite, _of(found, suite, threads, cache)))
    return "\n\n".join(parts)


def _suite_table(suite: str, shown: list[Record]) -> str:
    names = list(dict.fromkeys(who for record in shown for who in record["timings"]))
    rows = []
    for record in shown:
        ours = next(iter(record["timings"].values()))["p50"]
        cells = []
        for who in names:
            timing = record["timings"].get(who)
            cells.append(
                "–"
                if timing is None
                else f"{milliseconds(timing['p50'])} ({times(timing['p50'] / ours)})"
            )
        rows.append([described(record), *cells, *_model(record)])
    title = f"`{suite}`, {shown[0]['threads']} threads, {shown[0]['cache']} cache"
    return f"### {title}\n\n" + table(["case", *names, "GFLOP", "MB", "floor"], rows)


def _model(record: Record) -> list[str]:
    """What the case asks for, and the least time for it."""
    if "work" not in record:
        return ["–"] * 3
    work = record["work"]
    floor = milliseconds(record["roofline"]["floor_ms"])
    return [f"{work['flops'] / 1e9:.3g}", f"{work['bytes'] / 1e6:.3g}", floor]


def largest_problems(found: list[Record]) -> str:
    """The largest K of the memory suite with a time, per candidate."""
    shown = [record for record in found if record["suite"] == "search_memory"]
    largest: dict[str, Record] = {}
    for record in sorted(shown, key=lambda record: record["case"]["K"]):
        largest |= dict.fromkeys(record["timings"], record)
    rows = [
        [who, str(one["case"]["K"]), _mebibytes(one, who), milliseconds(one["timings"][who]["p50"])]
        for who, one in largest.items()
    ]
    return table(["candidate", "largest K", "peak MiB", "ms"], rows) if rows else "No record yet."


def _mebibytes(record: Record, who: str) -> str:
    peak = record["peak_bytes"][who]
    return "–" if peak is None else f"{peak / 2**20:.0f}"
