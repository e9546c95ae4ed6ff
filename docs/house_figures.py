"""The house in numbers: rooms, floors, arrows and lines of a package, and a token's hops through one MoE layer.

``python docs/house_figures.py`` measures this tree, ``python docs/house_figures.py FOLDER`` another one.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

NAME = "lightning_tex"
# They name what others define: every room may be imported by them.
FACES = {"__init__", "__main__", "errors", "language_model"}


def room_of(path: Path, package: Path) -> str:
    """The folder or module at the top that a file is of."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def arrows(package: Path) -> dict[str, set[str]]:
    """Which rooms each room imports, at its top or inside a function."""
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room = room_of(path, package)
        if room in FACES:
            continue
        below = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            parts = [name.split(".") for name in names if name.startswith(f"{NAME}.")]
            below |= {other for _, other, *_ in parts} - {room} - FACES
    return {room: below & found.keys() for room, below in found.items()}


def floors(below: dict[str, set[str]]) -> int:
    """The length of the longest way down; a circle of rooms is an error."""

    @cache
    def floor(room: str) -> int:
        return 1 + max(map(floor, below[room]), default=0)

    return max(map(floor, below))


def lines(package: Path) -> Counter[str]:
    """Lines by room, the faces together as ``top``."""
    counts: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        room = room_of(path, package)
        counts["top" if room in FACES else room] += len(path.read_text().splitlines())
    return counts


def hops(package: Path) -> tuple[int, int]:
    """The functions of the package that the forward of one MoE layer enters, alone and dropless, and their files."""
    sys.path.insert(0, str(package.parent))
    import torch

    from lightning_tex.moe import MoE

    layer, x = MoE(8, 16, num_experts=4, top_k=2), torch.randn(2, 6, 8)
    layer(x)
    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(package)) and not code.co_name.startswith("<"):
            entered.add(code)

    sys.setprofile(note)
    layer(x)
    sys.setprofile(None)
    return len(entered), len({code.co_filename for code in entered})


def main(package: Path) -> None:
    below = arrows(package)
    print(f"rooms {len(below)}, floors {floors(below)}, arrows {sum(map(len, below.values()))}")
    functions, files = hops(package)
    print(f"hops of a token through one MoE layer: {functions} functions in {files} files")
    counted = lines(package)
    print(f"lines {counted.total():,}: " + ", ".join(f"{room} {count:,}" for room, count in counted.most_common()))


if __name__ == "__main__":
    main((Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / NAME).resolve())
