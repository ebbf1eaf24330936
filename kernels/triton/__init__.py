"""Triton kernels, one file per op, imported as `fastvq.kernels.triton`.

Each file holds the `@triton.jit` kernels of one op and one launcher per direction: tensors in,
tensors out, no autograd. Tuned tile sizes lie in `configs/` as JSON, one file per device. This
version ships no Triton kernel.
"""
