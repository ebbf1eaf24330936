"""`fastvq evaluate`: likelihoods of test data."""

from __future__ import annotations

import argparse
from typing import Any

from .asked import is_of_text_run, picked
from .options import DATA, add_command, add_data_options, add_device_options


def add_evaluate(commands: Any) -> None:
    command = add_command(
        commands,
        "evaluate",
        _evaluate,
        "ELBO or bits per dimension of test pictures",
        "For a VAE: the negative evidence lower bound in nats per picture (of binarised pictures,\n"
        "where it was trained on such). For a prior: an upper bound on the bits per dimension of\n"
        f"8-bit pictures, those of the codes and those of the picture given the codes.\n\n{DATA}",
        "fastvq evaluate --run runs/digits-vae --data mnist --split test",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vae or a prior")
    add_data_options(command)
    command.add_argument(
        "--limit", type=int, metavar="N", help="only the first N pictures (default: all)"
    )
    command.add_argument(
        "--samples", type=int, default=1, metavar="N", help="vae: draws of the latent (default 1)"
    )
    add_device_options(command, batch_size=64)


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastvq.train.metrics import evaluate_bits_per_dim, evaluate_code_bits, evaluate_elbo
    from fastvq.train.processes import device_of
    from fastvq.train.run_data import is_of_sounds
    from fastvq.train.run_folder import load_run

    run = load_run(arguments.run)
    options: dict[str, Any] = {
        **picked(arguments, "split", "batch_size", "limit"),
        "device": device_of(arguments.device),
    }
    if is_of_text_run(arguments.run):
        from fastvq.train.text_bits import evaluate_text

        results = evaluate_text(run, arguments.data, samples=arguments.samples, **options)
    elif run.kind == "vae":
        binarise = run.resolved["binarise"]
        results = evaluate_elbo(
            run, arguments.data, binarise=binarise, samples=arguments.samples, **options
        )
    elif run.stage1 is not None and is_of_sounds(load_run(run.stage1)):
        results = evaluate_code_bits(run, arguments.data, only=arguments.only, **options)
    elif run.kind == "prior":
        results = evaluate_bits_per_dim(run, arguments.data, **options)
    else:
        raise ValueError(
            f"run '{arguments.run}' must be of a vae or a prior; a {run.kind} has no likelihood. "
            "Use fastvq reconstruct for its errors, or evaluate a prior over its codes."
        )
    for name, value in results.items():
        print(f"{name}: {value:.6g}")
