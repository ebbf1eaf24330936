"""`fastvq encode`: pictures to codes, and where these go unless told otherwise."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .asked import picked
from .options import DATA, add_command, add_data_options, add_device_options


def add_encode(commands: Any) -> None:
    command = add_command(
        commands,
        "encode",
        _encode,
        "turn pictures into codes, for a prior to be trained on",
        "Encodes every picture with a trained VQ-VAE or VQ-VAE-2 and writes memory-mapped arrays\n"
        f"of codes with a JSON manifest.\n\n{DATA}",
        "fastvq encode --run runs/photos --data photos.zip --out runs/photos/codes-train",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vqvae or vqvae2")
    add_data_options(command)
    command.add_argument(
        "--class-pattern", metavar="REGEX", help="as fastvq train's (default: that of the run)"
    )
    command.add_argument(
        "--clip-seconds",
        type=float,
        metavar="S",
        help="sounds: how much of each is encoded, from its start (default: as in the run)",
    )
    command.add_argument(
        "--out", metavar="DIR", help="folder to write (default RUN/codes-SPLIT or codes-NAME)"
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse a broken picture, not leave it out"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing code folder")
    add_device_options(command, batch_size=64, workers=True)


def _encode(arguments: argparse.Namespace) -> None:
    from fastvq.train.codes import CodeFolder, extract_codes

    out = arguments.out
    if out is None:
        out = code_folder(arguments.run, arguments.data, arguments.split)
    path = extract_codes(
        arguments.run,
        arguments.data,
        out,
        **picked(arguments, "split", "only", "class_pattern", "clip_seconds", "batch_size"),
        **picked(arguments, "device", "workers", "overwrite", "strict"),
    )
    print(f"codes: {path}")
    broken = CodeFolder(path).manifest["source"]["broken"]
    if broken:
        print(f"{broken} files could not be decoded and were left out; each is named above")


def code_folder(run: str, data: str, split: str | None) -> Path:
    """Where codes go unless told otherwise: RUN/codes-SPLIT, or codes-NAME of the data."""
    return Path(run) / f"codes-{split or stem(data)}"


def stem(data: str) -> str:
    """photos for photos.zip; the folder's name for a folder."""
    path = Path(data)
    return path.name if path.is_dir() else path.name.partition(".")[0]
