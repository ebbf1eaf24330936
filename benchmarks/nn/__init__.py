"""Suites of `fastvq.nn`: modules beside those they replace."""
