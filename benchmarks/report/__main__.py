"""`python -m benchmarks.report`: README.md and docs/benchmarks.md as the records say."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.static import regression

from . import gpu_tables, plots, tables

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BLOCK = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Exit status: 0; 1 where --check found a page or plot that the records do not give."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is stale")
    arguments = parser.parse_args()
    stale = stale_pages()
    for path, text in stale.items():
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'stale' if arguments.check else 'written'}")
    if arguments.check:
        old = stale_plots()
        print("\n".join(f"{name}: stale" for name in old) or "plots: as the records say")
        return 1 if stale or old else 0
    for path in plots.draw_all(records.latest(records.read()), regression.load()):
        print(f"{path.relative_to(ROOT)}: drawn")
    return 0


def stale_pages() -> dict[Path, str]:
    """The pages that differ from what the records generate, with that text."""
    found = {}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        generated = generate(text)
        if generated != text:
            found[path] = generated
    return found


def stale_plots() -> list[str]:
    """The plots that show something else than the records hold."""
    shown = plots.data(records.latest(records.read()), regression.load())
    return [name for name, data in shown.items() if data and not plots.up_to_date(name, data)]


def generate(text: str, folder: Path = records.FOLDER) -> str:
    """A page with every block between markers made anew."""
    everything = records.read(folder)
    found = records.latest(everything)
    blocks = {
        "cpu": lambda: tables.cpu_table(found),
        "gpu": lambda: gpu_tables.gpu_table(everything, regression.load()),
        "suites": lambda: tables.suite_tables(found),
        "largest": lambda: tables.largest_problems(found),
    }
    return _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match[2]]()}\n\n{match[3]}", text)


if __name__ == "__main__":
    sys.exit(main())
