"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

Tests on CUDA, compute-sanitizer, and the timings of the search, the training step and the sums
beside their rivals. `parts.py` lists the parts, `runner.py` runs them one by one, each in its own
process under its own time limit, and appends what it found to benchmarks/results/. A run that was
cut off goes on with the parts that have no line yet.
"""
