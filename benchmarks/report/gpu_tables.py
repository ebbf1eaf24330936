"""The README's GPU table: what a GPU run measured, or else what the machine code predicts."""

from __future__ import annotations

from typing import Any

from .tables import Record, milliseconds, table, times


def gpu_table(found: list[Record], baseline: dict[str, Any]) -> str:
    """The measured table where there is a record of a GPU run, and the prediction always."""
    measured = [
        one
        for one in found
        if one["suite"] == "gpu" and one["part"].startswith("search") and one["status"] == "passed"
    ]
    return "\n\n".join(filter(None, [_measured(measured), _predicted(baseline)]))


def _measured(shown: list[Record]) -> str:
    if not shown:
        return ""
    machine, last = shown[-1]["machine"], shown[-1]
    rows = []
    for case in (case for one in shown for case in one["result"]["cases"]):
        medians = {who: timing["p50"] for who, timing in case["timings"].items()}
        ours = medians.pop("fastvq")
        best = min(medians, key=lambda who: medians[who])
        size = ", ".join(f"{key}={value}" for key, value in case["case"].items())
        rival = f"{milliseconds(medians[best])} ({times(medians[best] / ours)})"
        rows.append([size, milliseconds(ours), rival, best])
    head = ["nearest code", "fastvq, ms", "strongest rival, ms", "rival"]
    said = (
        f"Measured on {machine['gpu']}, {last['time'][:10]}, CUDA {machine['cuda']}, torch "
        f"{last['versions']['torch']}, Triton {last['versions'].get('triton', 'none')}, commit "
        f"{(last['commit'] or 'none')[:10]}: `python -m benchmarks.gpu`."
    )
    return said + "\n\n" + table(head, rows)


def _predicted(baseline: dict[str, Any]) -> str:
    rows = [
        [
            one["size"],
            f"{one['predicted_us']:.0f}",
            f"{one['hopper_us']:.0f}" if one["hopper_us"] else "–",
            f"{one['floor_us']:.0f}",
            *(str(one["row"][name]) for name in ("registers", "spills", "shared", "occupancy")),
            str(one["row"]["matrix"]),
            f"{one['row']['alu']:.2f}",
        ]
        for one in sizes(baseline)
    ]
    head = [
        *("N×K×D", "predicted, µs", "warp-specialised, µs", "floor, µs", "registers", "spills"),
        *("shared, bytes", "occupancy, %", "matrix instructions", "ALU per (row, code) pair"),
    ]
    said = (
        f"**Predicted, not measured**: what Triton {max(baseline, key=_version)} makes of the "
        "search for an H200 (sm_90), and the time that a model of the chip gives it; the floor is "
        "one 16-bit pass of the matrix units or one reading of the input. "
        "`python -m benchmarks.static` prints it for every kernel, configuration and architecture."
    )
    return said + "\n\n" + table(head, rows)


def sizes(baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Per benchmark size: predicted times of the plain and the opt-in search, floor, and row."""
    rows = baseline[max(baseline, key=_version)]
    timed = [row for row in rows if row.get("us")]
    names = dict.fromkeys(size for row in timed for size in row["us"])
    found = []
    for size in sorted(names, key=_channels_last):
        plain = [row for row in timed if row["kernel"].startswith("search") and size in row["us"]]
        hopper = [row for row in timed if row["kernel"].startswith("hopper") and size in row["us"]]
        if plain:
            predicted, floor = plain[0]["us"][size]
            found.append(
                {
                    "size": size,
                    "predicted_us": predicted,
                    "floor_us": floor,
                    "hopper_us": min((row["us"][size][0] for row in hopper), default=None),
                    "row": plain[0],
                }
            )
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _channels_last(size: str) -> tuple[int, ...]:
    return tuple(map(int, reversed(size.split("×"))))
