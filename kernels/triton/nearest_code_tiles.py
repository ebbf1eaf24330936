"""Which tiles a search takes: data per architecture, a default in code, never tuned on a call."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

CONFIGURATIONS = Path(__file__).with_name("configs") / "nearest_code.json"
# More id bits than this cost the certificate more than keeping ids apart costs the fold.
MOST_ID_BITS = 9


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Compile-time choices of the search.

    Attributes:
        max_channels: the widest D it serves; None: any.
        terms: 1: one fp16 product; 3: high·high + high·low + low·high, and the norm as columns.
        block_n: rows of a program.
        block_k: codes of a tile.
        group: codes of a slot, re-searched by the certificate.
        warps: of a program.
        stages: tiles of codes in flight.
        paired: two tiles to an iteration, each product before the fold of the tile before.
        tma: read codes through a tensor descriptor.
        chunk: columns of a product held at a time; where fewer than all, rows lie in memory too.
        hopper: search with nearest_code_hopper.py, whose own tiling then holds.
        step: codes of one trip of the search's loop, which their number is padded to; 0: a tile,
            or two where paired.
    """

    max_channels: int | None = None
    terms: int = 1
    block_n: int = 64
    block_k: int = 64
    group: int = 4
    warps: int = 4
    stages: int = 2
    paired: bool = False
    tma: bool = False
    chunk: int = 64
    hopper: bool = False
    step: int = 0

    @property
    def step_codes(self) -> int:
        return self.step or self.block_k * (2 if self.paired else 1)

    def width(self, channels: int) -> int:
        """Columns of the fp16 operands: a power of two ≥ 16 with room for every term."""
        used = channels if self.terms == 1 else 3 * channels + 4
        return max(16, 1 << (used - 1).bit_length())

    def id_bits(self, tiles: int) -> int:
        """Low bits of a score that hold its tile's number; 0 where it is kept apart."""
        bits = max(1, (tiles - 1).bit_length())
        return 0 if self.terms == 3 or bits > MOST_ID_BITS else bits


DEFAULT = Tiles()


@functools.cache
def shipped() -> dict[str, tuple[Tiles, ...]]:
    """The data file: per architecture, from the narrowest rows to the widest."""
    data = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))
    del data["provenance"]
    return {name: tuple(Tiles(**entry) for entry in entries) for name, entries in data.items()}


def architecture(capability: tuple[int, int]) -> str:
    """The data file's name for a compute capability."""
    exact = f"sm_{capability[0]}{capability[1]}"
    if exact in shipped():
        return exact
    # Datacenter parts have 163 KiB of shared memory or more; the others of any generation 99.
    return "sm_100" if capability[0] == 10 else "sm_86"


def hopper_enabled() -> bool:
    """Whether the user asked for nearest_code_hopper.py on Hopper: FASTVQ_HOPPER_KERNELS=1."""
    return os.environ.get("FASTVQ_HOPPER_KERNELS", "0") == "1"


def hopper_tiles(channels: int) -> Tiles | None:
    """What nearest_code_hopper.py needs the other kernels to know; None where it cannot serve."""
    # Only here, because Triton before 3.6 lacks what it imports.
    from .nearest_code_hopper import TILE_CODES, TILINGS

    tiles = Tiles(terms=3 if channels <= 16 else 1)
    tiling = TILINGS.get((tiles.width(channels), tiles.terms == 1))
    if tiling is None:
        return None
    return dataclasses.replace(
        tiles, block_k=TILE_CODES.value, group=tiling.group, hopper=True, step=tiling.stage_codes
    )


def choose_tiles(channels: int, capability: tuple[int, int] | None) -> Tiles:
    """The tiles for rows of this many channels; without a GPU (the interpreter) the default's."""
    if capability is None:
        return dataclasses.replace(DEFAULT, terms=3 if channels <= 16 else 1, paired=channels <= 16)
    if capability == (9, 0) and hopper_enabled():
        tiles = hopper_tiles(channels)
        if tiles is not None:
            return tiles
    for tiles in shipped()[architecture(capability)]:
        if tiles.max_channels is None or channels <= tiles.max_channels:
            return tiles
    return DEFAULT
