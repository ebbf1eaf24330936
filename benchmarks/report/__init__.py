"""The tables and plots of README.md and docs/benchmarks.md, generated from benchmarks/results/.

`tables.py` makes text from records, `gpu_tables.py` from GPU runs and the static report,
`plots.py` draws, and `python -m benchmarks.report` writes all of it between the markers

    <!-- benchmarks: NAME --> … <!-- end -->
"""
