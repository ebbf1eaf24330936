"""Triton kernels, one file per op, imported as `fastvq.kernels.triton`.

Each file holds the `@triton.jit` kernels of one op and one launcher per direction: tensors in,
tensors out, no autograd. Tile sizes lie in `configs/` as JSON, per architecture and with their
provenance.
"""
