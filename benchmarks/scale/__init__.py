"""Suites of curves: cost and memory as one size grows; `plots.py` draws them from the records."""
