"""`fastvq detect`: what is unlike the training data."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .options import DATA, SPLIT_HELP, add_command, add_data_options, add_device_options


def add_detect(commands: Any) -> None:
    command = add_command(
        commands,
        "detect",
        _detect,
        "flag pictures that are unlike those a run was trained on",
        "Scores every picture by how unlikely its codes are under a prior, by what its\n"
        "reconstruction misses, and by both; flags those above a threshold that at most the\n"
        "false-alarm rate of normal pictures exceed, whatever the model, as long as the held-in\n"
        "pictures are normal and no part of the run was trained on them. Writes a table (CSV and\n"
        f"JSON lines), a histogram, and heat maps of the flagged pictures.\n\n{DATA}",
        "fastvq detect --run runs/parts-prior --data new.zip --held-in good.zip --out found\n"
        "fastvq detect --run runs/parts --data new.zip --held-in good.zip --out found \\\n"
        "    --false-alarm-rate 0.01 --strict",
    )
    command.add_argument(
        "--run", required=True, metavar="DIR", help="of a prior; or of a first stage, without codes"
    )
    add_data_options(command)
    command.add_argument(
        "--held-in", required=True, metavar="DATA", help="normal pictures, not trained on"
    )
    command.add_argument("--held-in-split", choices=("train", "val", "test"), help=SPLIT_HELP)
    command.add_argument("--held-in-only", metavar="REGEX", help="as --only, of --held-in")
    command.add_argument(
        "--class-pattern", metavar="REGEX", help="as fastvq train's (default: that of the run)"
    )
    command.add_argument(
        "--clip-seconds",
        type=float,
        metavar="S",
        help="sounds: how much of each is heard, from its start (default: as in the run)",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    command.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of normal pictures, the share that may be flagged (default 0.05)",
    )
    command.add_argument(
        "--score",
        choices=("combined", "likelihood", "reconstruction"),
        help="what is flagged by (default: combined; without a prior, reconstruction)",
    )
    command.add_argument(
        "--levels", type=int, metavar="N", help="reconstruct from the top N levels (default: all)"
    )
    command.add_argument(
        "--normal", metavar="A,B", help="classes of the data that are normal: prints the AUROC"
    )
    command.add_argument(
        "--heat-maps", type=int, metavar="N", help="of the N oddest only (default: all flagged)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of the division of --held-in (default 0)"
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse a broken picture, not leave it out"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier detection")
    add_device_options(command, batch_size=64, workers=True)


def _detect(arguments: argparse.Namespace) -> None:
    from fastvq.train.detection import DetectionConfig, detect

    asked = vars(arguments)
    fields = {field.name for field in dataclasses.fields(DetectionConfig)}
    settings = {name: value for name, value in asked.items() if name in fields}
    if arguments.normal is not None:
        settings["normal"] = [name.strip() for name in arguments.normal.split(",")]
    found = detect(DetectionConfig(**settings))
    for score, area in (found.auroc or {}).items():
        print(f"{score:<14} AUROC {area:.4f}")
    left_out = f", {found.broken} left out" if found.broken else ""
    print(
        f"flagged: {found.flagged} of {len(found.rows)} (score above {found.threshold:.4g}; at "
        f"most {arguments.false_alarm_rate:.2g} of normal ones){left_out}"
    )
    print(f"detection: {found.path}")
