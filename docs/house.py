"""Write the house into design.md: the order of rooms from the import contract, the modules from their docstrings.

``python docs/house.py`` rewrites what lies between the markers; with ``--check`` it only tells, by its exit code, if
that would change anything.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_tex"
DESIGN = ROOT / "docs" / "design.md"


def layers() -> list[list[str]]:
    """The rooms of the contract, from the top to the bottom; those of one line do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    order = next(contract for contract in contracts if contract["type"] == "layers")["layers"]
    return [line.split(" | ") for line in order]


def picture() -> str:
    """The order of rooms."""
    return "\n".join("    " + " | ".join(rooms) for rooms in layers())


def modules() -> str:
    """One line for each module, by room."""
    return "\n\n".join(_listed(room) for rooms in layers() for room in rooms)


def _listed(room: str) -> str:
    folder = PACKAGE / room
    if not folder.is_dir():
        return f"**{room}**\n\n{_entry(folder.with_suffix('.py'), PACKAGE)}"
    paths = [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    entries = [_entry(path, folder) for path in sorted(paths, key=lambda path: (path.parent != folder, path))]
    return "\n".join([f"**{room}**: {_sentence(folder / '__init__.py')}\n", *entries])


def _entry(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix().removesuffix("__init__.py")
    return textwrap.fill(f"- `{name}`: {_sentence(path)}", 120, subsequent_indent="  ", break_on_hyphens=False)


def _sentence(path: Path) -> str:
    """The first sentence of a module's docstring, as Markdown."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    text = " ".join(paragraph.split()).replace("``", "`")
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda role: f"`{role[1].rsplit('.')[-1]}`", text)
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def rewritten(design: str) -> str:
    """``design`` with the generated parts as they are now."""
    for name, content in (("rooms", picture()), ("modules", modules())):
        begin, end = f"<!-- {name}: written by docs/house.py -->\n", f"<!-- end of {name} -->"
        before, rest = design.split(begin)
        design = f"{before}{begin}\n{content}\n\n{end}{rest.split(end)[1]}"
    return design


if __name__ == "__main__":
    now = DESIGN.read_text()
    then = rewritten(now)
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"{DESIGN.name} is not up to date: python docs/house.py" if now != then else 0)
    DESIGN.write_text(then)
