"""`fastvq sample`: new pictures, sounds or lines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .asked import is_of_text_run, picked
from .options import add_command, add_device_options


def add_sample(commands: Any) -> None:
    command = add_command(
        commands,
        "sample",
        _sample,
        "draw new pictures from a prior or a VAE",
        "Draws codes from a trained prior, decodes them, and writes a labelled grid; one row per\n"
        "class where the prior knows classes. The run of a VAE serves too.",
        "fastvq sample --run runs/photos-prior --count 64 --temperature 0.9 --out new.png\n"
        "fastvq sample --run runs/photos-prior --count 8 --complete photo.jpg --keep left-half",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a prior or a vae")
    command.add_argument(
        "--count", type=int, metavar="N", help="pictures in all (default: 8 per class, or 64)"
    )
    command.add_argument(
        "--class-labels", metavar="A,B", help="names or numbers of classes (default: all)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 likelier codes; 0 greedy (default 1)",
    )
    command.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest codes")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest codes of total share P"
    )
    command.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    command.add_argument(
        "--complete",
        metavar="PICTURE",
        help="keep the codes of a half of this picture, draw others",
    )
    command.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="vae of text: --count lines on the way between two sentences",
    )
    command.add_argument(
        "--keep",
        choices=("top-half", "bottom-half", "left-half", "right-half"),
        default="top-half",
        help="which half --complete keeps (default top-half)",
    )
    command.add_argument(
        "--keep-best",
        type=float,
        metavar="FRACTION",
        help="draw 1/FRACTION times as many, keep those the classifier is surest of",
    )
    command.add_argument(
        "--classifier", metavar="DIR", help="judge of --keep-best, from train-classifier"
    )
    command.add_argument(
        "--out", metavar="PATH.png", help="grid (default RUN/pictures/samples-SEED.png)"
    )
    command.add_argument(
        "--save-array",
        metavar="PATH",
        help="also as a data set: .npy (N, H, W, C) uint8, or .npz with the labels",
    )
    add_device_options(command, batch_size=64)


def _sample(arguments: argparse.Namespace) -> None:
    from fastvq.train.showing import (
        check_array_path,
        draw_samples,
        save_sample_array,
        save_samples,
    )

    if is_of_text_run(arguments.run):
        _sample_text(arguments)
        return
    if arguments.interpolate is not None:
        raise ValueError("--interpolate is of runs of text.")
    if arguments.save_array is not None:
        check_array_path(arguments.save_array)
    labels = arguments.class_labels
    samples = draw_samples(
        arguments.run,
        arguments.count,
        class_labels=None if labels is None else [name.strip() for name in labels.split(",")],
        **picked(arguments, "temperature", "top_k", "top_p", "seed", "complete", "keep"),
        **picked(arguments, "keep_best", "classifier", "batch_size", "device"),
        progress=True,
    )
    if arguments.save_array is not None:
        print(f"array: {save_sample_array(samples, arguments.save_array)}")
    out = arguments.out or Path(arguments.run) / "pictures" / f"samples-{arguments.seed}.png"
    if samples.rate is None:
        print(f"samples: {save_samples(samples, out)}")
    else:
        from fastvq.train.sound_showing import save_sound_samples

        print(f"samples: {save_sound_samples(samples, out)} (spectrograms: {out})")


def _sample_text(arguments: argparse.Namespace) -> None:
    from fastvq.train.processes import device_of
    from fastvq.train.run_folder import load_run
    from fastvq.train.text_showing import interpolate_lines, sample_lines

    run, device = load_run(arguments.run), device_of(arguments.device)
    for name in ("class_labels", "complete", "save_array"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} must be left out for text.")
    if arguments.interpolate is not None:
        first, last = arguments.interpolate
        lines = interpolate_lines(run, first, last, steps=arguments.count or 7, device=device)
    else:
        lines = sample_lines(
            run,
            arguments.count or 16,
            **picked(arguments, "seed", "temperature", "top_k", "top_p"),
            device=device,
        )
    text = "".join(f"{line}\n" for line in lines)
    out = arguments.out or run.pictures / f"samples-{arguments.seed}.txt"
    Path(out).write_text(text, encoding="utf-8")
    print(f"{text}samples: {out}")
