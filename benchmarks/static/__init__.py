"""What the compiler made of the GPU kernels, read from their machine code; no GPU needed.

`compile.py` builds a kernel ahead of time for any NVIDIA architecture, `sass.py` reads its machine
code, `hazards.py` checks what the matrix unit has in flight, `predict.py` turns counts into times,
`shipped.py` lists the kernels and configurations that the library ships, `regression.py` compares
with the committed figures, and `python -m benchmarks.static` prints the table. The bounds that
these figures must meet are asserted in `tests/kernels/triton/test_machine_code.py`.
"""
