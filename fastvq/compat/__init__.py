"""Other libraries' quantizers, masked convolutions and checkpoints, on fastvq."""

from fastvq.compat.checkpoints import load_codebook, read_state_dict
from fastvq.compat.replace import ModuleReport, equivalent, replace_modules
from fastvq.compat.rosinality_vqvae2 import load_rosinality_vqvae2

__all__ = [
    "ModuleReport",
    "equivalent",
    "load_codebook",
    "load_rosinality_vqvae2",
    "read_state_dict",
    "replace_modules",
]
