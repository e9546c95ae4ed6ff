"""README and docs/ say what is so: names, commands, links, messages, and the picture of the rooms."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lightning_tex.cli.main import COMMANDS as OWN_COMMANDS
from lightning_tex.recipe import TexCLI

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
PACKAGE = ROOT / "lightning_tex"
COMMANDS = {name.split()[0] for name in (*TexCLI.subcommands(), *OWN_COMMANDS)}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pages
def test_python_imports_public_names(page):
    for block in python_blocks(page):
        if block.startswith("--8<--"):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_tex"):
                module = importlib.import_module(node.module)
                public = getattr(module, "__all__", None) or [
                    name
                    for name, value in vars(module).items()
                    if inspect.getmodule(value) is module and name[0] != "_"
                ]
                hidden = {alias.name for alias in node.names} - set(public)
                assert not hidden, f"{node.module} does not have these among its public names: {hidden}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tex":
                assert node.attr in importlib.import_module("lightning_tex").__all__, f"tex.{node.attr}"


def commands(page: Path) -> list[list[str]]:
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(.+)$", text, re.MULTILINE) + re.findall(r"`(lightning-tex [^`]+)`", text)
    calls = [call for line in lines for call in re.findall(r"(?:^|&& |-m )(lightning[-_]tex .*)", line)]
    return [shlex.split(call, comments=True) for call in calls]


@pages
def test_commands_are_known(page):
    for words in commands(page):
        names = set(words[1].split("|")) - {"..."}
        assert names <= COMMANDS, " ".join(words)
        for path in re.findall(r"recipes/[\w.-]+", " ".join(words)):
            assert (ROOT / path).is_file(), " ".join(words)


def test_every_command_of_the_program_is_documented():
    shown = {name for page in PAGES for words in commands(page) for name in words[1].split("|")}
    assert COMMANDS - {"validate", "test", "predict"} <= shown


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pages
def test_files_of_the_repository_exist(page):
    for path in re.findall(r"`((?:tests|benchmarks|recipes|docs)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).is_file(), path


def test_the_design_shows_the_rooms_and_modules_that_there_are():
    told = subprocess.run([sys.executable, ROOT / "docs" / "house.py", "--check"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_the_picture_names_every_room():
    house = runpy.run_path(str(ROOT / "docs" / "house.py"))
    rooms = {room for line in house["layers"]() for room in line}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "errors", "language_model"}
    assert rooms == folders | files


def test_modules_of_the_tables_exist():
    house = (ROOT / "docs" / "design.md").read_text().split("## 4. The house")[1].split("### Modules")[0]
    named = re.findall(r"`(\w+/(?:\w+\.py)?)`", house)
    assert len(named) > 15
    assert not [path for path in named if not (PACKAGE / path).exists()]


def test_every_room_has_a_page():
    house = runpy.run_path(str(ROOT / "docs" / "house.py"))
    rooms = {room for line in house["layers"]() for room in line}
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert pages - {"index", "errors"} == rooms - {"cli", "bench", "recipe"}


@cache
def strings_of_the_package() -> list[str]:
    """Every text in the code; what an f-string fills in is a NUL."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return texts


MESSAGES = re.findall(r"^### (.+)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_faq_are_those_of_the_package(message):
    assert any(says(text, message.split("..")) for text in strings_of_the_package())


def says(text: str, parts: list[str]) -> bool:
    """Whether a text has some parts one after the other, whatever lies between them."""
    start = 0
    for part in parts:
        found = text.find(part, start)
        if found < 0:
            return False
        start = found + len(part)
    return True


def test_there_are_messages():
    assert len(MESSAGES) >= 15
