"""`python -m benchmarks.static`: what the compiler made of every shipped kernel, as a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import triton

from benchmarks.static import hazards, regression, sass
from benchmarks.static.predict import H200_SIZES, predict
from benchmarks.static.shipped import Examined, Outcome, examine

# Exit status when a kernel did not compile, and when one is worse than its committed figures.
SOME_FAILED = 3
SOME_WORSE = 4
COLUMNS = {
    "kernel": "kernel",
    "sm": "sm",
    "registers": "regs",
    "blocks": "blk/SM",
    "occupancy": "warps %",
    "shared": "shared B",
    "spills": "spill",
    "hazards": "hazard",
    "matrix": "matrix",
    "products": "products",
    "alu": "ALU/pair",
    "fma": "FMA/pair",
    "issued": "all/pair",
    "overlap": "overlap",
}


def summarise(case: Examined) -> dict[str, Any]:
    """One row of the table. Of several main loops (one per warpgroup) the dearest counts."""
    program = sass.parse(case.code.sass)
    blocks = sass.blocks_per_sm(case.code)
    row: dict[str, Any] = {
        "kernel": case.name,
        "sm": case.capability,
        "registers": case.code.registers,
        "blocks": blocks,
        "occupancy": 100 * blocks * case.code.warps // sass.WARPS_PER_SM,
        "shared": case.code.shared_bytes,
        "spills": sass.count_spills(program),
        "hazards": len(hazards.find_hazards(program)) + len(hazards.find_dummies(program)),
    }
    if case.search is None:
        return row
    loops = sass.find_main_loops(program)
    costs = [sass.measure(loop, case.search) for loop in loops]
    dearest = max(costs, key=lambda cost: cost.alu)
    row["matrix"] = max(sass.count(loop.body, sass.MATRIX) for loop in loops)
    row |= {
        name: getattr(dearest, name) for name in ("products", "alu", "fma", "issued", "overlap")
    }
    row["us"] = predicted_times(case, program, loops, dearest)
    return row


def predicted_times(
    case: Examined, program: sass.Program, loops: list[sass.Loop], cost: sass.LoopCost
) -> dict[str, tuple[float, float]]:
    """Predicted and least possible time in µs of the H200 sizes with these channels."""
    search, model = case.search, case.model
    if search is None or model is None or case.capability != 90:
        return {}
    outside = (len(program.instructions) - sum(len(loop.body) for loop in loops)) / len(loops)
    times = {}
    for size in H200_SIZES:
        if size.channels == model.channels:
            result = predict(
                *(size, cost, search.products, outside / model.rows),
                *(model.group, model.block_rows, model.hidden),
            )
            times[size.name] = (result.total_us, result.floor_us)
    return times


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [list(COLUMNS.values())]
    lines += [[_text(row.get(name)) for name in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    for row in rows:
        for size, (predicted, floor) in row.get("us", {}).items():
            text.append(
                f"{row['kernel']}, sm_{row['sm']}, {size}: {predicted:.0f} µs predicted on an "
                f"H200, floor {floor:.0f} µs"
            )
    return "\n".join(text)


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def failure_lines(report: dict[str, Any]) -> str:
    """A line for every case of a report that did not compile."""
    return "\n".join(
        f"{name}, sm_{capability}, Triton {report['triton']}: {error}"
        for name, capability, error in report["failures"]
    )


def summarise_all(outcome: Outcome) -> dict[str, Any]:
    """The report of a whole run under this process's Triton, as JSON can hold it."""
    return {
        "triton": triton.__version__,
        "rows": [summarise(case) for case in outcome.examined],
        "failures": [[*key, error] for key, error in outcome.failures.items()],
    }


def other_version(site: str) -> dict[str, Any]:
    """This command's JSON under the Triton of another folder of packages."""
    path = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.static", "--json"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=False
    )
    if done.returncode not in (0, SOME_FAILED):
        raise RuntimeError(f"benchmarks.static failed under the Triton of {site}")
    return json.loads(done.stdout)


def side_by_side(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Both versions' tables in one, a row of each after the other."""
    found = {(row["kernel"], row["sm"]): row for row in theirs["rows"]}
    rows = []
    for row in ours["rows"]:
        for version, one in ((ours, row), (theirs, found.get((row["kernel"], row["sm"])))):
            if one is not None:
                rows.append({**one, "kernel": f"{one['kernel']} ({version['triton']})"})
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--triton", metavar="SITE", help="folder of another Triton, to compare")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--check", action="store_true", help="compare with baseline.json")
    parser.add_argument("--update", action="store_true", help="write this Triton's baseline.json")
    parser.add_argument("--workers", type=int, default=2, help="compilations at once")
    arguments = parser.parse_args()
    reports = [summarise_all(examine(workers=arguments.workers))]
    if arguments.json:
        print(json.dumps(reports[0]))
    elif arguments.triton:
        reports.append(other_version(arguments.triton))
        print(side_by_side(*reports))
    else:
        print(f"Triton {triton.__version__}")
        print(table(reports[0]["rows"]))
    failed = [failure_lines(report) for report in reports if report["failures"]]
    if failed:
        print("\n".join(["did not compile:", *failed]), file=sys.stderr)
        sys.exit(SOME_FAILED)
    if arguments.update:
        regression.save(triton.__version__, reports[0]["rows"])
    if arguments.check:
        worse = compare(reports[0])
        print("\n".join(["worse than committed:", *worse] if worse else ["as committed"]))
        sys.exit(SOME_WORSE if worse else 0)


def compare(report: dict[str, Any]) -> list[str]:
    """What is worse than the committed rows of the same Triton (a line if there are none)."""
    committed = regression.load().get(report["triton"])
    if committed is None:
        return [f"nothing is committed for Triton {report['triton']}: --update"]
    return regression.regressions(report["rows"], committed)


if __name__ == "__main__":
    main()
