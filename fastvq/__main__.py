"""`python -m fastvq`: the command line of `fastvq.cli`."""

from __future__ import annotations

import sys

from fastvq.cli import main

if __name__ == "__main__":
    sys.exit(main())
