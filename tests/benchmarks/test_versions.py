"""``benchmarks/versions.py``, and the one place that the version stands in."""

from __future__ import annotations

import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import versions

import lightning_tex

TRACKED = ["README.md", "lightning_tex/__init__.py", "lightning_tex/py.typed"]


def archives(folder: Path, in_sdist: list[str], in_wheel: list[str]) -> tuple[Path, Path]:
    sdist, wheel = folder / "a.tar.gz", folder / "a.whl"
    (folder / "file").touch()
    with tarfile.open(sdist, "w:gz") as archive:
        for name in in_sdist:
            archive.add(folder / "file", f"lightning_tex-1/{name}")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*in_wheel, "lightning_tex-1.dist-info/METADATA"]:
            archive.writestr(name, "")
    return sdist, wheel


def test_archives_hold_the_tree_and_the_package(tmp_path: Path) -> None:
    versions.check_contents(*archives(tmp_path, [*TRACKED, "PKG-INFO"], TRACKED[1:]), TRACKED)


@pytest.mark.parametrize(
    ("in_sdist", "in_wheel", "told"),
    [
        (TRACKED[:2], TRACKED[1:], "the sdist lacks lightning_tex/py.typed"),
        (TRACKED, TRACKED[1:2], "the wheel lacks lightning_tex/py.typed"),
        (TRACKED, [*TRACKED[1:], "tests/conftest.py"], "the wheel has besides tests/conftest.py"),
    ],
)
def test_what_archives_lack_or_have_besides_is_told(tmp_path, in_sdist, in_wheel, told) -> None:
    with pytest.raises(versions.Failed, match=f"^{told}$"):
        versions.check_contents(*archives(tmp_path, in_sdist, in_wheel), TRACKED)


def test_the_version_stands_in_one_place() -> None:
    configuration = tomllib.loads((versions.ROOT / "pyproject.toml").read_text())
    assert "version" not in configuration["project"] and configuration["project"]["dynamic"] == ["version"]
    package, _, attribute = configuration["tool"]["setuptools"]["dynamic"]["version"]["attr"].partition(".")
    assert package == "lightning_tex" and isinstance(getattr(lightning_tex, attribute), str)


def test_a_row_takes_the_place_of_its_predecessor_alone() -> None:
    page = f"before\n{versions.BEGIN}\n| a |\n| --- |\n\n{versions.END}\nafter\n"
    others = [""] * len(versions.SHOWN)
    first = versions.rewritten(
        page, [["oldest", "3.11.7", "2.13.0", *others, "x"], ["newest", "3.11.7", "2.13.0", *others, "y"]]
    )
    second = versions.rewritten(first, [["oldest", "3.11.7", "2.13.0", *others, "z"]])
    assert second == first.replace("| x |", "| z |") and second.startswith("before") and second.endswith("after\n")
    assert [cells[-1] for cells in versions.rows_of(second)] == ["y", "z"]
