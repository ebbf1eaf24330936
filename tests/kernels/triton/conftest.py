"""The static checks live in benchmarks/, which only `python -m pytest` finds by itself."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))
