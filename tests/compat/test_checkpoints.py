"""Checkpoints of other libraries: whole VQ-VAE-2s, codebooks, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from compat import host_modules as hosts
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

from fastvq.compat import load_codebook, load_rosinality_vqvae2, read_state_dict
from fastvq.models import VQVAE2

CHANNEL, RES_CHANNEL, DIM, CODES = 8, 4, 6, 10


def rosinality_state(blocks: int = 2) -> dict[str, Tensor]:
    """A state dict of that VQ-VAE-2, at random: names and shapes of its layers."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def add(name: str, out: int, into: int, size: int, transposed: bool = False) -> None:
        shape = (into, out, size, size) if transposed else (out, into, size, size)
        scale = (into * size * size) ** -0.5
        state[f"{name}.weight"] = scale * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    def residuals(name: str, first: int) -> int:
        for block in range(first, first + blocks):
            add(f"{name}.blocks.{block}.conv.1", RES_CHANNEL, CHANNEL, 3)
            add(f"{name}.blocks.{block}.conv.3", CHANNEL, RES_CHANNEL, 1)
        return first + blocks

    half = CHANNEL // 2
    add("enc_b.blocks.0", half, 3, 4)
    add("enc_b.blocks.2", CHANNEL, half, 4)
    add("enc_b.blocks.4", CHANNEL, CHANNEL, 3)
    residuals("enc_b", 5)
    add("enc_t.blocks.0", half, CHANNEL, 4)
    add("enc_t.blocks.2", CHANNEL, half, 3)
    residuals("enc_t", 3)
    add("quantize_conv_t", DIM, CHANNEL, 1)
    add("dec_t.blocks.0", CHANNEL, DIM, 3)
    add(f"dec_t.blocks.{residuals('dec_t', 1) + 1}", DIM, CHANNEL, 4, True)
    add("quantize_conv_b", DIM, DIM + CHANNEL, 1)
    add("upsample_t", DIM, DIM, 4, True)
    add("dec.blocks.0", CHANNEL, 2 * DIM, 3)
    last = residuals("dec", 1)
    add(f"dec.blocks.{last + 1}", half, CHANNEL, 4, True)
    add(f"dec.blocks.{last + 3}", 3, half, 4, True)
    for name in ("quantize_t", "quantize_b"):
        state[f"{name}.embed"] = 0.3 * torch.randn(DIM, CODES, generator=generator)
        state[f"{name}.cluster_size"] = 5 * torch.rand(CODES, generator=generator)
        state[f"{name}.embed_avg"] = state[f"{name}.embed"] * state[f"{name}.cluster_size"]
    return state


def reference(state: dict[str, Tensor], x: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction and codes (top, bottom) of normalised pictures, layer by layer, in float64."""
    state = {key: value.double() for key, value in state.items()}

    def conv(name: str, h: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def up(name: str, h: Tensor) -> Tensor:
        return F.conv_transpose2d(h, state[f"{name}.weight"], state[f"{name}.bias"], 2, 1)

    def residuals(name: str, h: Tensor, first: int) -> Tensor:
        for block in range(first, first + blocks):
            inner = conv(f"{name}.blocks.{block}.conv.1", h.relu(), 1, 1).relu()
            h = h + conv(f"{name}.blocks.{block}.conv.3", inner)
        return h.relu()

    def quantize(name: str, h: Tensor) -> tuple[Tensor, Tensor]:
        codes = state[f"{name}.embed"].T
        rows = h.permute(0, 2, 3, 1)
        ids = hosts.distances(rows.reshape(-1, DIM), codes).argmin(1).view(rows.shape[:-1])
        return codes[ids].permute(0, 3, 1, 2), ids

    h = conv("enc_b.blocks.0", x, 2, 1).relu()
    h = conv("enc_b.blocks.2", h, 2, 1).relu()
    bottom = residuals("enc_b", conv("enc_b.blocks.4", h, 1, 1), 5)
    h = conv("enc_t.blocks.0", bottom, 2, 1).relu()
    top = residuals("enc_t", conv("enc_t.blocks.2", h, 1, 1), 3)
    quant_t, ids_t = quantize("quantize_t", conv("quantize_conv_t", top))
    h = residuals("dec_t", conv("dec_t.blocks.0", quant_t, 1, 1), 1)
    h = torch.cat([up(f"dec_t.blocks.{blocks + 2}", h), bottom], 1)
    quant_b, ids_b = quantize("quantize_b", conv("quantize_conv_b", h))
    h = conv("dec.blocks.0", torch.cat([up("upsample_t", quant_t), quant_b], 1), 1, 1)
    h = up(f"dec.blocks.{blocks + 2}", residuals("dec", h, 1)).relu()
    return up(f"dec.blocks.{blocks + 4}", h), ids_t, ids_b


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_vqvae2_equals_the_network_it_comes_from(blocks: int) -> None:
    state = rosinality_state(blocks)
    assert len(state) == 32 + 16 * blocks  # 64 with two blocks
    model = load_rosinality_vqvae2(state, VQVAE2).eval().double()
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    expected, top, bottom = reference(state, 2 * x - 1, blocks)
    with torch.no_grad():
        out = model(x)
        decoded = model.decode_codes([top, bottom])
    assert torch.equal(out.codes[0], top)
    assert torch.equal(out.codes[1], bottom)
    # Some fifteen layers, each a sum of at most 16·C terms: n·u each, grown by the layers after
    # it; these weights keep the size of what passes through them.
    bound = 15 * 15 * 16 * (2 * DIM + CHANNEL) * UNIT_ROUNDOFF[torch.float64]
    bound *= 1 + expected.abs().max().item()
    assert (2 * out.reconstruction - 1 - expected).abs().max().item() <= bound
    assert (2 * decoded - 1 - expected).abs().max().item() <= bound


def test_vqvae2_goes_on_training_as_there() -> None:
    state = rosinality_state()
    model = load_rosinality_vqvae2(state, VQVAE2)
    assert model.training
    host = hosts.Quantize(DIM, CODES)
    names = ("embed", "cluster_size", "embed_avg")
    host.load_state_dict({name: state[f"quantize_b.{name}"] for name in names})
    rows = torch.randn(300, DIM)
    for _ in range(3):
        _, diff, ids = host(rows)
        out = model.codebooks[0](rows)
        assert torch.equal(out.indices, ids)
        terms = 3 * rows.numel()
        bound = 4 * 2 * terms * UNIT_ROUNDOFF[torch.float32]
        assert abs(out.commitment.item() - diff.item()) <= bound * diff.item()
        for name in names:
            theirs, ours = getattr(host, name), getattr(model.codebooks[0], name)[0]
            theirs = theirs.T if theirs.dim() == 2 else theirs
            assert (ours - theirs).abs().max().item() <= bound * theirs.abs().max().item()


def test_files_are_read_without_unpickling(tmp_path: Path) -> None:
    state = rosinality_state()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "nested.pt")
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    for name in ("plain.pt", "nested.pt", "weights.safetensors"):
        read = read_state_dict(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)
        assert load_rosinality_vqvae2(str(tmp_path / name), VQVAE2).num_codes == CODES


class Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": rosinality_state(), "args": Trap(sprung)}, tmp_path / "trap.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(sprung)))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name, message in (
        ("trap.pt", "holds more than tensors"),
        ("raw.pt", "holds more than tensors"),
        ("cut.safetensors", "not a whole safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_state_dict(tmp_path / name)
    assert not sprung.exists()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_state_dict(tmp_path / "missing.pt")


def _state(*keys: str) -> dict[str, Tensor]:
    return {key: torch.zeros(4, 3) for key in keys}


REFUSED = {
    "PixelSNAIL": _state("background", "horizontal.conv.conv.weight_v", "vertical.conv.bias")
    | _state("blocks.0.resblocks.0.conv1.conv.weight_v"),
    "VQGAN of taming": _state("quantize.embedding.weight", "encoder.down.0.block.0.norm1.weight"),
    "autoencoder of diffusers": _state(
        "quantize.embedding.weight", "encoder.down_blocks.0.resnets.0.norm1.weight"
    ),
    "LlamaGen": _state("quantize.embedding.weight", "encoder.conv_blocks.0.res.0.norm1.weight"),
    "EnCodec": _state("quantizer.vq.layers.0._codebook.embed"),
    "Descript Audio Codec": _state("quantizer.quantizers.0.codebook.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got an? .*{name}.*, which is not supported: .*;"):
        load_rosinality_vqvae2(REFUSED[name], VQVAE2)


def test_incomplete_checkpoints_are_refused() -> None:
    state = rosinality_state()
    del state["dec.blocks.0.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing dec\.blocks\.0\.bias; unexpected extra\."):
        load_rosinality_vqvae2(state, VQVAE2)
    with pytest.raises(ValueError, match="got 1 tensors of another kind"):
        load_rosinality_vqvae2({"weight": torch.zeros(2)}, VQVAE2)
    with pytest.raises(ValueError, match="must hold a state dict; got dict"):
        read_state_dict({})


CODEBOOKS: dict[str, tuple[Any, bool]] = {
    "rosinality": (lambda: hosts.Quantize(DIM, CODES), False),
    "rosinality square": (lambda: hosts.Quantize(DIM, DIM), False),
    "taming": (lambda: hosts.VectorQuantizer2(CODES, DIM, 0.25), True),
    "diffusers": (lambda: hosts.DiffusersVectorQuantizer(CODES, DIM, 0.25), True),
    "encodec": (lambda: hosts.VectorQuantization(DIM, CODES, kmeans_init=False), False),
}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebooks_quantize_as_where_they_come_from(name: str) -> None:
    build, learnable = CODEBOOKS[name]
    model = nn.ModuleDict({"quantize": build().eval(), "head": nn.Linear(2, 2)})
    codebook = load_codebook(model.state_dict(), decay=0.9).eval()
    assert codebook.learnable == learnable
    assert codebook.decay == 0.9
    assert isinstance(codebook.embed, nn.Parameter) == learnable
    rows = torch.randn(50, DIM)
    x = rows if "rosin" in name else rows.T[None] if name == "encodec" else rows.T[None, ..., None]
    outputs = model["quantize"](x)
    (indices,) = (
        part
        for part in (*outputs, *(outputs[2] if isinstance(outputs[2], tuple) else ()))
        if isinstance(part, Tensor) and part.dtype == torch.int64
    )
    assert torch.equal(codebook(rows).indices, indices.view(-1))


def test_one_of_several_codebooks_is_taken_by_its_path() -> None:
    model = hosts.ResidualVectorQuantization(
        num_quantizers=2, dim=DIM, codebook_size=CODES, kmeans_init=False
    )
    state = nn.ModuleDict({"vq": model}).state_dict()
    codebook = load_codebook(state, "vq.layers.1")
    assert torch.equal(codebook.embed[0], model.layers[1].codebook)
    with pytest.raises(ValueError, match=r"it has 'vq\.layers\.0', 'vq\.layers\.1'\."):
        load_codebook(state)
    with pytest.raises(ValueError, match="got 'vq', and source has"):
        load_codebook(state, "vq")
    with pytest.raises(ValueError, match="it has none"):
        load_codebook({"weight": torch.zeros(2, 2)})
