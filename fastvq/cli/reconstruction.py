"""`fastvq reconstruct`: pictures, sounds or lines beside what their codes hold."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .asked import is_of_text_run, picked
from .codes import stem
from .options import DATA, add_command, add_data_options, add_device_options


def add_reconstruct(commands: Any) -> None:
    command = add_command(
        commands,
        "reconstruct",
        _reconstruct,
        "show what each level of codes holds",
        "Writes pictures beside their reconstructions from the top level alone, the top and the\n"
        "next, … and all levels, and prints the error of each: MSE of values in 0…1, and PSNR in\n"
        f"dB.\n\n{DATA}",
        "fastvq reconstruct --run runs/photos --data photos-test.zip --count 8",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vae, vqvae or vqvae2")
    add_data_options(command)
    command.add_argument(
        "--count", type=int, default=8, metavar="N", help="pictures shown (default 8)"
    )
    command.add_argument(
        "--measure",
        type=int,
        default=256,
        metavar="N",
        help="pictures the errors are means over, evenly spaced (default 256)",
    )
    command.add_argument(
        "--out", metavar="PATH.png", help="default RUN/pictures/reconstructions-NAME.png"
    )
    command.add_argument(
        "--strict", action="store_true", help="sounds: refuse a broken file, not leave it out"
    )
    add_device_options(command, batch_size=16, workers=True)


def _reconstruct(arguments: argparse.Namespace) -> None:
    from fastvq.train.run_data import is_of_sounds
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import show_reconstructions

    name = f"reconstructions-{arguments.split or stem(arguments.data)}.png"
    out = arguments.out or Path(arguments.run) / "pictures" / name
    if is_of_text_run(arguments.run):
        _reconstruct_text(arguments)
        return
    if is_of_sounds(load_run(arguments.run)):
        _reconstruct_sounds(arguments, out)
        return
    errors = show_reconstructions(
        arguments.run,
        arguments.data,
        out,
        **picked(arguments, "count", "measure", "split", "only", "batch_size"),
        **picked(arguments, "device", "workers"),
    )
    for error in errors:
        print(f"{error.name:<14} MSE {error.mse:.6f}   PSNR {error.psnr:.2f} dB")
    print(f"reconstructions: {out}")


def _reconstruct_sounds(arguments: argparse.Namespace, out: str | Path) -> None:
    from fastvq.train.processes import device_of
    from fastvq.train.run_folder import load_run
    from fastvq.train.sound_showing import show_sound_reconstructions

    report = show_sound_reconstructions(
        load_run(arguments.run),
        arguments.data,
        out,
        **picked(arguments, "count", "measure", "split", "only", "strict"),
        device=device_of(arguments.device),
    )
    for error in report.errors:
        print(
            f"{error.name:<14} SNR {error.snr:.2f} dB   log-spectral distance "
            f"{error.log_spectral_distance:.2f} dB   {error.bits_per_second:.0f} bits/s "
            f"(entropy {error.entropy_bits_per_second:.0f})"
        )
    skipped = f"; {report.broken} could not be decoded" if report.broken else ""
    print(f"{report.sounds} sounds: {report.folder} (spectrograms: {out}){skipped}")


def _reconstruct_text(arguments: argparse.Namespace) -> None:
    from fastvq.train.processes import device_of
    from fastvq.train.run_folder import load_run
    from fastvq.train.text_bits import evaluate_text
    from fastvq.train.text_showing import reconstruct_lines

    run, device = load_run(arguments.run), device_of(arguments.device)
    if run.kind == "prior":
        raise ValueError(
            f"run '{run.path}' must be of a vae or vqvae; it is of a prior. Name the run whose "
            f"codes it draws: '{run.stage1}'."
        )
    pairs = reconstruct_lines(
        run, arguments.data, count=arguments.count, split=arguments.split, device=device
    )
    text = "".join(f"{line}\n→ {again}\n\n" for line, again in pairs)
    name = f"reconstructions-{arguments.split or stem(arguments.data)}.txt"
    out = arguments.out or run.pictures / name
    Path(out).write_text(text, encoding="utf-8")
    print(text, end="")
    results = evaluate_text(
        run, arguments.data, split=arguments.split, limit=arguments.measure, baselines=False
    )
    for name, value in results.items():
        print(f"{name}: {value:.6g}")
    print(f"reconstructions: {out}")
