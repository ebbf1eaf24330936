"""What fastvq costs beside its rivals: `python -m benchmarks --help`.

A suite is a module with `CASES`, `QUICK_CASES` and `prepare(case, context)`; `suites.py` lists
them. A case becomes candidates: callables that are checked on the very inputs they are then timed
on. Rivals are optional, and one that cannot run is named with the reason.
"""
