"""Import name of the top-level `kernels/` tree, and the one way to the C++ core.

An installed package finds `fastvq.kernels.triton` beside this file (setup.py maps it here); in a
checkout the lines below point to `<checkout>/kernels`. The C++ kernels are the private top-level
module `_fastvq_C`, which is missing where the package was installed without a compiler.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "triton").is_dir():
    __path__.append(str(_checkout / "kernels"))


@functools.cache
def load_cpu_extension() -> tuple[ModuleType | None, str]:
    """The C++ core, or the reason why it cannot be used.

    Returns:
        `(module, "")`, or `(None, reason)` with one plain sentence. Asking again costs nothing.
    """
    try:
        return importlib.import_module("_fastvq_C"), ""
    except ModuleNotFoundError:
        return None, (
            "the C++ kernels are not built (no working C++ compiler or ninja when fastvq was "
            "installed; `pip install -v` prints why)"
        )
    except ImportError as error:
        return None, f"the C++ kernels do not load: {error}"
