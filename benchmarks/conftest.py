"""`pytest benchmarks`, from anywhere: the checkout's packages are found after everything else."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
