"""From the options of a command to the arguments of what it calls, and what its run is of."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def picked(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names, to be passed on under the same names."""
    return {name: getattr(arguments, name) for name in names}


def given_fields(
    arguments: argparse.Namespace, config: type[Any], flags: dict[str, str]
) -> dict[str, Any]:
    """The options that were given, as fields of `config`; model arguments in one dict."""
    asked = vars(arguments)
    fields = {field.name for field in dataclasses.fields(config)}
    given = {name: value for name, value in asked.items() if name in fields}
    model_arguments = {name: asked[name] for name in flags if name in asked}
    for pair in asked.get("set", []):
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ValueError(f"--set must be NAME=VALUE; got {pair!r}.")
        try:
            model_arguments[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            model_arguments[name.replace("-", "_")] = text
    if model_arguments:
        given["model_arguments"] = model_arguments
    return given


def require_options(given: dict[str, Any], *names: str) -> None:
    """ValueError unless the options of these names were given."""
    missing = [f"--{name}" for name in names if given.get(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given, unless --resume goes on with a run."
        )


def resumed(config: type[Any], run: str, given: dict[str, Any], kinds: Sequence[str]) -> Any:
    """The configuration of a run, with the options that were given on top.

    What may not change is refused by the training itself.
    """
    from fastvq.train.run_folder import load_run

    started = load_run(run)
    if started.kind not in kinds:
        raise ValueError(
            f"run '{run}' must be of a {' or '.join(kinds)}; it is of a {started.kind}. Resume it "
            f"with fastvq {'train-prior' if started.kind == 'prior' else 'train'}."
        )
    model = started.config.get("model")
    if given.get("model", model) != model:
        raise ValueError(
            f"--model must be that of run '{run}', {model}, or left out; got {given['model']}."
        )
    fields = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in started.config.items() if name in fields}
    merged = {**settings.get("model_arguments", {}), **given.get("model_arguments", {})}
    return config(**{**settings, **given, "model_arguments": merged})


def is_of_text_run(run: str) -> bool:
    """Whether a run is of text, or of a prior over codes of text."""
    from fastvq.train.run_folder import load_run
    from fastvq.train.text_lines import is_of_text

    opened = load_run(run)
    return is_of_text(opened if opened.stage1 is None else load_run(opened.stage1))


def say_where(path: Path, next_step: str) -> None:
    """Where a training run lies; said once, by the main process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"run: {path} (pictures in {path / 'pictures'}); {next_step}.")
