"""Import of VQ-VAE-2 checkpoints of rosinality/vq-vae-2-pytorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checkpoints import WAYS_OUT, Source, architecture, read_state_dict

Model = TypeVar("Model", bound=nn.Module)


def load_rosinality_vqvae2(source: Source, model_class: Callable[..., Model]) -> Model:
    """A VQ-VAE-2 checkpoint of rosinality/vq-vae-2-pytorch as a `fastvq.models.VQVAE2`.

        model = load_rosinality_vqvae2("vqvae_560.pt", fastvq.models.VQVAE2)

    The network is the same: a picture in 0 … 1 gives the codes and the reconstruction that its
    normalised form, 2x − 1, gives there, with exact indices. The arguments that the checkpoint
    leaves open are those of its training script, so that training goes on with the same loss and
    the same moving averages: `commitment_weight` 0.25, `decay` 0.99 (what the script is given is
    not passed on there), no revival, no level dropout, and `data_variance` 0.25, which makes an
    error on the scale 0 … 1 one on −1 … 1.

    Args:
        source: as `fastvq.compat.read_state_dict`: 64 tensors with two residual blocks.
        model_class: `fastvq.models.VQVAE2` (this room may not import models itself).
    Returns:
        The model, float32, on the CPU, in training mode.
    Raises:
        FileNotFoundError, ValueError: as `read_state_dict`; a checkpoint of something else, which
            is named with what to do instead; tensors missing or left over.
    Razavi et al. 2019, arXiv:1906.00446.
    """
    state = read_state_dict(source)
    kind = architecture(state)
    if kind != "a VQ-VAE-2 of rosinality/vq-vae-2-pytorch":
        way_out = f" is not supported: {WAYS_OUT[kind]}" if kind in WAYS_OUT else ""
        raise ValueError(
            "load_rosinality_vqvae2: source must hold a VQ-VAE-2 of rosinality/vq-vae-2-pytorch; "
            f"got {kind or f'{len(state)} tensors of another kind'}{', which' if way_out else ''}"
            f"{way_out}."
        )
    keys = dict(_keys(_count_blocks(state)))
    _check_keys(state, keys)
    arguments = _arguments(state)
    weights = {own: state[theirs] for theirs, own in keys.items()}
    for level in range(2):
        weights |= _codebook_state(weights, f"codebooks.{level}.")
    model = model_class(**arguments)
    model.load_state_dict(weights)
    return model


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    return sum(
        re.fullmatch(r"enc_b\.blocks\.\d+\.conv\.1\.weight", key) is not None for key in state
    )


def _arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = _count_blocks(state)
    dim, num_codes = state["quantize_t.embed"].shape
    return {
        "in_channels": state["enc_b.blocks.0.weight"].shape[1],
        "levels": 2,
        "hidden_channels": state["enc_b.blocks.4.weight"].shape[0],
        "residual_channels": state["enc_b.blocks.5.conv.1.weight"].shape[0] if blocks else 1,
        "num_residual_blocks": blocks,
        "downsample": 4,
        "num_codes": num_codes,
        "code_dim": dim,
        "commitment_weight": 0.25,
        "codebook": "ema",
        "decay": 0.99,
        "kmeans_init": False,
        "revive_below": 0.0,
        "level_dropout": 0.0,
        "data_variance": 0.25,
    }


def _keys(blocks: int) -> Iterator[tuple[str, str]]:
    """(their key, our key) of every tensor, for networks with that many residual blocks."""
    layers: list[tuple[str, str]] = [
        ("quantize_conv_b", "to_code.0"),
        ("quantize_conv_t", "to_code.1"),
        ("upsample_t", "upsamplers.1.0"),
    ]
    # Name there and here, plain layers there and here, position of the residual blocks there and
    # of the stack of them here. A decoder's last layers come after its blocks and a ReLU.
    last = blocks + 2
    networks = (
        ("enc_b", "encoders.0", {0: 0, 2: 2, 4: 4}, 5, 5),
        ("enc_t", "encoders.1", {0: 0, 2: 2}, 3, 3),
        ("dec_t", "level_decoders.0", {0: 0, last: 2}, 1, 1),
        ("dec", "decoder", {0: 0, last: 2, last + 2: 4}, 1, 1),
    )
    for theirs, ours, plain, first, stack in networks:
        layers += [(f"{theirs}.blocks.{a}", f"{ours}.{b}") for a, b in plain.items()]
        layers += [
            (f"{theirs}.blocks.{first + block}.conv.{conv}", f"{ours}.{stack}.{block}.net.{conv}")
            for block in range(blocks)
            for conv in (1, 3)
        ]
    for theirs, ours in layers:
        for name in ("weight", "bias"):
            yield f"{theirs}.{name}", f"{ours}.{name}"
    for theirs, ours in (("quantize_b", "codebooks.0"), ("quantize_t", "codebooks.1")):
        for name in ("embed", "cluster_size", "embed_avg"):
            yield f"{theirs}.{name}", f"{ours}.{name}"


def _check_keys(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
    problems = [f"missing {key}" for key in keys if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in keys]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"load_rosinality_vqvae2: source does not hold the whole network: "
            f"{'; '.join(problems[:3])}{more}."
        )


def _codebook_state(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Statistics (K,) and codes (D, K) as those of a `Codebook` with one book."""
    return {
        f"{prefix}initted": torch.tensor(True),
        f"{prefix}cluster_size": weights[f"{prefix}cluster_size"][None],
        f"{prefix}embed_avg": weights[f"{prefix}embed_avg"].t()[None],
        f"{prefix}embed": weights[f"{prefix}embed"].t()[None],
    }
