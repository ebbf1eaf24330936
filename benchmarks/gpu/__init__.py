"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

Tests on CUDA, compute-sanitizer, all suites beside their rivals, and the search's tiles tuned
(`tuning.py`). `parts.py` lists the parts, `runner.py` runs them one by one, each in its own process
under its own time limit, and appends what it found to the machine's record in benchmarks/results/.
A call takes eight minutes at most; a run that was cut off goes on with the parts that have no line
yet.
"""
