"""Saving and loading of models: safetensors weights beside a JSON configuration.

Lives here: the `Pretrained` mixin, which remembers the arguments a model was built with, and the
reading and checking of the two files. Training checkpoints (optimizer, step, RNG) are not here.
Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import numbers
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvq.version import __version__

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_CHECKSUM_KEY = "sha256"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Model = TypeVar("Model", bound="Pretrained")


class Pretrained:
    """Mixin for an `nn.Module`: `config`, `save_pretrained`, `from_pretrained`.

    Every constructor of a subclass is wrapped so that the arguments of the outermost call,
    defaults included, are kept in `self.config` as JSON values (tuples become lists; constructors
    should accept both). A constructor may not take `*args` or positional-only arguments: those
    have no name to be stored under.
    """

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            init = _recording(cls.__dict__["__init__"], cls.__name__)
            cls.__init__ = init  # type: ignore[method-assign]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` into `directory`, which is made if missing.

        Each file is written under a temporary name and moved into place, so that a reader never
        sees half of one. Every key of the state dict is stored in its own dtype; tensors that
        share memory are stored once per key.

        Raises:
            TypeError: the state dict holds something that is not a tensor.
        """
        from safetensors.torch import save_file

        assert isinstance(self, nn.Module)
        state: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"save_pretrained: state_dict[{key!r}] must be a tensor; "
                    f"got {type(value).__name__}."
                )
            state[key] = value.detach().to("cpu", copy=True).contiguous()
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                f"save_pretrained: '{folder}' must be a folder, new or old; a file is there."
            )
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", _CHECKSUM_KEY: _checksum(state)}
        replace_file(
            folder / WEIGHTS_NAME,
            lambda path: save_file(state, path, metadata=metadata),
        )
        config = {
            "class": type(self).__name__,
            "fastvq_version": __version__,
            "arguments": self.config,
        }
        text = json.dumps(config, indent=2) + "\n"
        replace_file(
            folder / CONFIG_NAME, lambda path: Path(path).write_text(text, encoding="utf-8")
        )

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory_or_hub_id: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Rebuild a saved model, in eval mode, with parameters in the dtype the class builds.

        Args:
            directory_or_hub_id: a folder written by `save_pretrained`, or "owner/name" on the
                Hugging Face hub (needs `huggingface_hub`) where no such folder exists.
            device: where the model goes.
            revision, cache_dir, local_files_only: handed to `huggingface_hub`.
        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a file is broken, belongs to another class, or does not fit this class.
            RuntimeError: a package that is needed is not installed, or the hub cannot be read.
        """
        config_path, weights_path = _locate(
            directory_or_hub_id,
            {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only},
        )
        arguments = _read_arguments(config_path, cls)
        # Building draws random initial weights, all overwritten: the caller's generator stays.
        with torch.random.fork_rng(devices=[]):
            try:
                model = cls(**arguments)
            except (TypeError, ValueError) as error:
                raise ValueError(f"from_pretrained: {config_path}: {error}") from error
        assert isinstance(model, nn.Module)
        model.load_state_dict(_read_weights(weights_path, model.state_dict()))
        return model.to(device).eval()


def _recording(init: Callable[..., None], class_name: str) -> Callable[..., None]:
    """`init`, keeping the arguments of the outermost constructor call in `self.config`."""
    signature = inspect.signature(init)
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"{class_name}: constructor argument {parameter.name!r} must have a name to be "
                f"saved under; got a {parameter.kind.description} argument."
            )

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if "config" not in self.__dict__:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.__dict__["config"] = _recorded(bound, class_name)
        init(self, *args, **kwargs)

    return wrapped


def _recorded(bound: inspect.BoundArguments, class_name: str) -> dict[str, Any]:
    """The bound arguments, without self, as JSON values; `**kwargs` merged in."""
    recorded: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            for key, extra in value.items():
                recorded[key] = _json_value(extra, class_name, key)
        else:
            recorded[name] = _json_value(value, class_name, name)
    return recorded


def _json_value(value: Any, class_name: str, name: str) -> Any:
    """`value` as plain JSON data; TypeError where it has no such form."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_json_value(item, class_name, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _json_value(item, class_name, name) for key, item in value.items()}
    raise TypeError(
        f"{class_name}: {name} must be a number, string, bool, None, or a list, tuple or dict of "
        f"these, so that it can be saved; got {type(value).__name__}."
    )


def replace_file(target: Path, write: Callable[[str], Any]) -> None:
    """Let `write` fill a temporary file beside `target`, then move it there in one step."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would lock other readers out
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over every key, dtype, shape and value; the order of the keys does not matter."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _locate(source: str | os.PathLike[str], hub: dict[str, Any]) -> tuple[Path, Path]:
    """Paths of the configuration and the weights, fetched from the hub where need be."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "from_pretrained: directory_or_hub_id must be a path or 'owner/name'; got "
            f"{type(source).__name__}."
        )
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"from_pretrained: {folder / name} does not exist.")
        return folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if folder.exists() or _HUB_ID.fullmatch(str(source)) is None:
        raise FileNotFoundError(
            f"from_pretrained: {str(source)!r} must be a folder written by save_pretrained, or a "
            "hub id 'owner/name'; there is no such folder."
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise RuntimeError(
            f"from_pretrained: there is no folder {str(source)!r}, and reading it as a hub id "
            "needs huggingface_hub, which is not installed: pip install huggingface_hub."
        ) from error
    try:
        config, weights = (
            Path(hf_hub_download(str(source), name, **hub)) for name in (CONFIG_NAME, WEIGHTS_NAME)
        )
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RuntimeError(
            f"from_pretrained: there is no folder {str(source)!r}, and reading it as a hub id "
            f"failed: {reason}"
        ) from error
    return config, weights


def _read_arguments(path: Path, cls: type) -> dict[str, Any]:
    """The constructor arguments in `path`, checked against the constructor of `cls`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise ValueError(
            f"from_pretrained: {path} must hold an object with 'class' and 'arguments'."
        )
    if config.get("class") != cls.__name__:
        raise ValueError(
            f"from_pretrained: {path} describes a {config.get('class')}, not a {cls.__name__}; "
            "load it with the class it names."
        )
    arguments: dict[str, Any] = config["arguments"]
    parameters = list(inspect.signature(cls).parameters.values())
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        unknown = sorted(arguments.keys() - {parameter.name for parameter in parameters})
        if unknown:
            raise ValueError(
                f"from_pretrained: {path} (fastvq {config.get('fastvq_version')}) has arguments "
                f"that {cls.__name__} of fastvq {__version__} does not take: {', '.join(unknown)}."
            )
    return arguments


def _read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in `path`, checked to be whole and to fit `expected` key by key."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not a whole safetensors file: {error}."
        ) from error
    if metadata.get(_CHECKSUM_KEY, _checksum(state)) != _checksum(state):
        raise ValueError(
            f"from_pretrained: {path} does not match the checksum it was saved with; the file "
            "was altered or damaged. Save it again, or restore a copy."
        )
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key in expected.keys() & state.keys():
        want, got = expected[key], state[key]
        if want.shape != got.shape:
            problems.append(f"{key} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        elif want.is_floating_point() != got.is_floating_point():
            problems.append(f"{key} is {got.dtype}, expected {want.dtype}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"from_pretrained: {path} does not fit the model: {'; '.join(problems[:3])}{more}."
        )
    return state
