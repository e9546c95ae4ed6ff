"""What the package imports is what it declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_tex"
# A package's name for pip, where it is another than for Python.
CALLED = {"yaml": "pyyaml"}
# Asked for where they are used, with a word on what to do without them.
OPTIONAL = {"matplotlib", "transformers", "sonicmoe"}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Packages below a node, and whether a function imports them; those for types alone are left out."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                modules = [alias.name for alias in child.names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case _:
                yield from imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
                continue
        yield from ((module.split(".")[0], inside) for module in modules)


def foreign() -> Iterator[tuple[Path, str, bool]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, inside in imports(ast.parse(path.read_text())):
            if name not in sys.stdlib_module_names and name != PACKAGE.name:
                yield path, CALLED.get(name, name), inside


def test_what_is_imported_is_declared_or_optional():
    undeclared = {(str(path), name, inside) for path, name, inside in foreign() if name not in declared()}
    assert {name for _, name, _ in undeclared} <= OPTIONAL
    at_import = [(path, name) for path, name, inside in undeclared if not inside]
    assert not at_import, "an optional package is imported with the module"


def test_what_is_declared_is_imported():
    assert declared() <= {name for _, name, _ in foreign()}
