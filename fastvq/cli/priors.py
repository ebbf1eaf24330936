"""`fastvq train-prior`: priors over the codes of a first stage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .asked import given_fields, require_options, resumed, say_where
from .codes import code_folder
from .options import ABSENT, SPLIT_HELP, add_command, add_model_options, add_training_options, path

PRIOR_FLAGS = {
    "hidden_channels": "width of each level's PixelCNN (default 64)",
    "num_layers": "gated layers of each (default 15)",
    "kernel_size": "side of their convolutions, odd (default 3)",
    "dropout": "probability, in 0…1 (default 0)",
}


def add_train_prior(commands: Any) -> None:
    command = add_command(
        commands,
        "train-prior",
        _train_prior,
        "train the autoregressive priors over a model's codes",
        "Trains one gated PixelCNN per level of codes, each conditioned on the levels above and,\n"
        "where the data has classes, on the class. --data is a folder of codes that `fastvq\n"
        "encode` wrote; or pictures, together with --vqvae, which encodes them first. Resumes as\n"
        "`fastvq train` does.",
        "fastvq train-prior --data runs/photos/codes-train --run runs/photos-prior\n"
        "fastvq train-prior --data photos.zip --vqvae runs/photos --run runs/photos-prior",
    )
    own = command.add_argument_group("model and data")
    own.add_argument(
        "--data", type=path, metavar="PATH", help="a folder of codes, or pictures", **ABSENT
    )
    own.add_argument("--vqvae", metavar="DIR", help="run that encodes pictures", **ABSENT)
    own.add_argument("--split", choices=("train", "val", "test"), help=SPLIT_HELP, **ABSENT)
    own.add_argument(
        "--overwrite", action="store_true", help="replace the codes that --vqvae made before"
    )
    own.add_argument(
        "--weight-average",
        type=float,
        metavar="DECAY",
        help="decay of the averaged weights that are kept, 0 for none (default 0.999)",
        **ABSENT,
    )
    own.add_argument(
        "--class-conditional",
        action=argparse.BooleanOptionalAction,
        help="show the prior the class (default: where the data has classes)",
        **ABSENT,
    )
    own.add_argument("--preset", help="a named configuration, such as laptop-256", **ABSENT)
    add_training_options(command)
    add_model_options(command, PRIOR_FLAGS)


def _train_prior(arguments: argparse.Namespace) -> None:
    from fastvq.train.priors import PriorConfig, train_prior

    given = given_fields(arguments, PriorConfig, PRIOR_FLAGS)
    if not arguments.resume:
        require_options(vars(arguments), "data")
    codes = _codes_of(arguments)
    if codes is not None:
        given["codes"] = codes
    if arguments.resume:
        config = resumed(PriorConfig, arguments.run, given, ("prior",))
    else:
        config = PriorConfig(**given)
    path = train_prior(config, resume=arguments.resume)
    say_where(path, "fastvq sample draws from it")


def _codes_of(arguments: argparse.Namespace) -> str | None:
    """The folder of codes to train on, where --data names it or the pictures it is made from.

    Pictures are encoded into the folder that `fastvq encode` would choose; codes that are there
    already, of the same pictures and the same weights, are taken as they are.
    """
    from fastvq.train.codes import MANIFEST, CodeFolder, extract_codes
    from fastvq.train.run_folder import RunFolder, load_run

    data, split = getattr(arguments, "data", None), getattr(arguments, "split", None)
    vqvae = getattr(arguments, "vqvae", None)
    if vqvae is None:
        if split is not None:
            raise ValueError(
                "--split is of pictures, with --vqvae; folders of codes have no parts."
            )
        return None if data is None else str(Path(data).expanduser().absolute())
    if data is None:
        raise ValueError("--vqvae must come with --data, the pictures that it encodes.")
    out = code_folder(vqvae, data, split)
    if arguments.resume:
        return str(out.absolute())
    RunFolder.check(arguments.run, None, False)  # before the pictures are encoded
    if (out / MANIFEST).is_file() and not arguments.overwrite:
        found = CodeFolder(out)
        source = found.manifest["source"]
        same = source["path"] == str(Path(data).absolute()) and source["split"] == split
        if same and found.stage1["weights_sha256"] == load_run(vqvae).weights_sha256:
            print(f"codes: {out} (made before)")
            return str(out.absolute())
    return str(extract_codes(vqvae, data, out, split=split, overwrite=arguments.overwrite))
