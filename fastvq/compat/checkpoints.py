"""Reading other libraries' checkpoint files without unpickling, and codebooks out of them.

Lives here: files and dictionaries to plain state dicts, saying which architecture one is of, and
`load_codebook`. Whole models are imported in the files named after them.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.nn.codebook import Codebook

Source = str | os.PathLike[str] | Mapping[str, Any]

# Where checkpoints keep the state dict, the first that is there.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(source: Source) -> dict[str, Tensor]:
    """The state dict in a checkpoint. Nothing is ever unpickled.

    Args:
        source: a `.safetensors` file, a file of `torch.save` that holds tensors and plain
            containers, or what such a file holds. The state dict may lie under "state_dict",
            "model_state_dict" or "model", and its keys may begin with "module." or "_orig_mod.".
    Returns:
        Tensors by key, on the CPU where they were read from a file.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one that would have to be unpickled.
    """
    content: Any = source if isinstance(source, Mapping) else _read_file(Path(source))
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"read_state_dict: source must hold a state dict; got {type(content).__name__}."
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"read_state_dict: there is no file {path}.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"read_state_dict: {path} is not a whole safetensors file: {error}."
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"read_state_dict: {path} holds more than tensors, or is no checkpoint ({reason}). "
            "Save its state dict alone, where you trust the file: "
            "torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)."
        ) from error


# What tells an architecture: keys that a checkpoint of it has, as patterns.
_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "a VQ-VAE-2 of rosinality/vq-vae-2-pytorch": (r"quantize_t\.embed$", r"enc_b\.blocks\.0\."),
    "a PixelSNAIL prior of rosinality/vq-vae-2-pytorch": (
        r"horizontal\.",
        r"vertical\.",
        r"blocks\.0\.resblocks\.0\.",
    ),
    "a VQ autoencoder of diffusers": (
        r"quantize\.embedding\.weight$",
        r"encoder\.down_blocks\.0\.",
    ),
    "a VQGAN of taming-transformers": (r"quantize\.embed(ding)?\.weight$", r"encoder\.down\.0\."),
    "an image tokenizer of LlamaGen": (
        r"quantize\.embedding\.weight$",
        r"encoder\.conv_blocks\.0\.",
    ),
    "an EnCodec model": (r"quantizer\.vq\.layers\.0\._codebook\.embed$",),
    "a Descript Audio Codec": (r"quantizer\.quantizers\.0\.codebook\.weight$",),
}

# Why an architecture has no fastvq model, and what to do instead.
WAYS_OUT: dict[str, str] = {
    "a PixelSNAIL prior of rosinality/vq-vae-2-pytorch": (
        "its weight-normalised ELU blocks and key-value attention have no counterpart in PixelCNN; "
        "train a fastvq.models.PixelCNN on the codes"
    ),
    "a VQ autoencoder of diffusers": (
        "its encoder and decoder have group normalisation and attention, which VQVAE2 has not; "
        "keep the model and call fastvq.replace_modules on it, or take its codes by load_codebook"
    ),
}
for _name in ("a VQGAN of taming-transformers", "an image tokenizer of LlamaGen"):
    WAYS_OUT[_name] = WAYS_OUT["a VQ autoencoder of diffusers"]
for _name in ("an EnCodec model", "a Descript Audio Codec"):
    WAYS_OUT[_name] = (
        "it is made for sound, and fastvq has no such model; keep the model and call "
        "fastvq.replace_modules on it, or take its codes by load_codebook"
    )


def architecture(state: Mapping[str, Any]) -> str | None:
    """Whose model a state dict is of, in words; None if it is none of those known."""
    for name, patterns in _ARCHITECTURES.items():
        if all(any(re.match(pattern, key) for key in state) for pattern in patterns):
            return name
    return None


def load_codebook(source: Source, prefix: str | None = None, *, decay: float = 0.99) -> Codebook:
    """The codes of one quantizer in another library's checkpoint, as a `fastvq.nn.Codebook`.

    Understood are the quantizers of rosinality/vq-vae-2-pytorch, taming-transformers, diffusers,
    LlamaGen, encodec, descript-audio-codec and vector-quantize-pytorch, the last with its
    separate codebooks. Codes that were trained by gradient stay learnable; with the others come
    their running statistics. What is beside the codes (projections, normalisation to length one)
    is not part of a codebook.

    Args:
        source: as `read_state_dict`.
        prefix: the quantizer's path in the model, as "quantize" or "quantizer.vq.layers.0"; None
            takes the only one there is.
        decay: γ of the codes that follow by moving averages, which checkpoints do not hold.
    Returns:
        A codebook (K codes of D channels) in float32, that starts nothing anew and revives nothing.
    Raises:
        FileNotFoundError, ValueError: as `read_state_dict`; no quantizer there, or several.
    """
    state = read_state_dict(source)
    found = _quantizers(state)
    if prefix is None:
        if len(found) != 1:
            listed = ", ".join(repr(path) for path in found) or "none"
            raise ValueError(
                f"load_codebook: prefix must name one of the quantizers in source; it has {listed}."
            )
        (prefix,) = found
    elif prefix not in found:
        listed = ", ".join(repr(path) for path in found) or "none"
        raise ValueError(
            f"load_codebook: prefix must be the path of a quantizer; got {prefix!r}, and source "
            f"has {listed}."
        )
    return _codebook({name: state[key] for name, key in found[prefix].items()}, decay)


# The last part of the key that holds codes, and whether a part before it belongs to it too.
_CODES = re.compile(
    r"^(?P<path>.*?)\.?(?P<name>_codebook\.embed|embed|embedding\.weight|codebook\.weight)$"
)


def _quantizers(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Paths of the quantizers, each with the keys of its codes and statistics."""
    found: dict[str, dict[str, str]] = {}
    for key in state:
        match = _CODES.match(key)
        if match is None or state[key].dim() not in (2, 3):
            continue
        path, name = match["path"], match["name"]
        owner = key.removesuffix("embed") if name.endswith("embed") else None
        keys = {"embed": key}
        if owner is not None:
            if f"{owner}cluster_size" not in state:
                continue
            keys |= {part: f"{owner}{part}" for part in ("cluster_size", "embed_avg")}
            for started in ("inited", "initted"):  # encodec's, vector-quantize-pytorch's
                if f"{owner}{started}" in state:
                    keys["initted"] = f"{owner}{started}"
        found[path] = keys
    return found


def _codebook(tensors: dict[str, Tensor], decay: float) -> Codebook:
    """A `Codebook` of codes (K, D) or (h, K, D), or rosinality's, which are (D, K)."""
    learnable = "cluster_size" not in tensors
    transposed = not learnable and "initted" not in tensors
    tensors = {name: tensor.detach().float() for name, tensor in tensors.items()}
    tensors.pop("initted", None)
    for name in ("embed", "embed_avg"):
        if name in tensors and transposed:
            tensors[name] = tensors[name].t()
    if tensors["embed"].dim() == 2:
        tensors = {name: tensor[None] for name, tensor in tensors.items()}
    heads, num_codes, dim = tensors["embed"].shape
    codebook = Codebook(
        num_codes,
        dim,
        num_codebooks=heads,
        learnable=learnable,
        decay=decay,
        kmeans_init=False,
        revive_below=0.0,
    )
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(codebook, name).copy_(tensor)
    return codebook
