"""The report of a version of Triton beside the one that was committed for it.

`baseline.json` holds the rows of `python -m benchmarks.static` per version of Triton. What may get
worse, and by how much, is stated here; a kernel without a row is as wrong as a worse one.
`python -m benchmarks.static --update` writes the rows of the Triton in use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).with_name("baseline.json")
# Largest multiple of the committed figure; registers and shared memory matter by what they do to
# the blocks per SM, which must not fall, and are let vary more.
MARGINS = {"alu": 1.05, "fma": 1.10, "issued": 1.05, "registers": 1.15, "shared": 1.15}
TIME_MARGIN = 1.05
NEVER_MORE = ("spills", "hazards")
NEVER_LESS = ("blocks", "matrix")

Row = dict[str, Any]


def load(path: Path = BASELINE) -> dict[str, list[Row]]:
    """Rows by version of Triton."""
    found: dict[str, list[Row]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def save(version: str, rows: list[Row], path: Path = BASELINE) -> None:
    """Replace the rows of one version; one line per row."""
    kept = {**(load(path) if path.exists() else {}), version: rows}
    parts = []
    for name in sorted(kept):
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in kept[name])
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def regressions(rows: list[Row], committed: list[Row]) -> list[str]:
    """One line for each figure that is worse than committed by more than its margin.

    Also for each kernel that only one of the two has.
    """
    now, before = _by_kernel(rows), _by_kernel(committed)
    found = [f"{_name(key)} has no committed row" for key in now.keys() - before.keys()]
    found += [f"{_name(key)} is committed and gone" for key in before.keys() - now.keys()]
    for key in now.keys() & before.keys():
        found += [f"{_name(key)}: {line}" for line in _worse(now[key], before[key])]
    return sorted(found)


def _worse(row: Row, old: Row) -> list[str]:
    lines = []
    for name, margin in MARGINS.items():
        if name in row and row[name] > margin * old.get(name, float("inf")):
            lines.append(f"{name} {row[name]:.4g}, was {old[name]:.4g}")
    for name in NEVER_MORE:
        if row[name] > old[name]:
            lines.append(f"{name} {row[name]}, was {old[name]}")
    for name in NEVER_LESS:
        if name in old and row.get(name, 0) < old[name]:
            lines.append(f"{name} {row.get(name, 0)}, was {old[name]}")
    for size, (time, _) in row.get("us", {}).items():
        if time > TIME_MARGIN * old.get("us", {}).get(size, [float("inf")])[0]:
            lines.append(f"{size} predicted {time:.0f} µs, was {old['us'][size][0]:.0f}")
    return lines


def _by_kernel(rows: list[Row]) -> dict[tuple[str, int], Row]:
    return {(row["kernel"], row["sm"]): row for row in rows}


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}, sm_{key[1]}"
