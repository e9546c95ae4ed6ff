"""Write the table of Lightning's surface into lightning.md, from the list that ``tests/strategy/test_surface.py`` runs.

``python docs/surface.py`` rewrites what lies between the markers; with ``--check`` it only tells, by its exit code, if
that would change anything.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lightning.md"
BEGIN, END = "<!-- surface: written by docs/surface.py -->\n", "<!-- end of surface -->"


def rewritten(page: str) -> str:
    """``page`` with the table as it is now."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where the list is
    from helpers.surface import table
    from helpers.surface_rows import ROWS

    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(ROWS)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    now = PAGE.read_text()
    then = rewritten(now)
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"{PAGE.name} is not up to date: python docs/surface.py" if now != then else 0)
    PAGE.write_text(then)
