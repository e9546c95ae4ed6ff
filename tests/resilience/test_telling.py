"""An error is printed once, and what goes wrong in handling it takes one line."""

from __future__ import annotations

import io
import sys

import pytest

from lightning_tex.resilience.telling import described, mark_told, tell


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def uncaught(first: Exception) -> None:
    """Python's report of an error that a hook raises while it handles the first one."""
    try:
        try:
            raise first
        finally:
            raise KeyError("in a hook")
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)


def test_what_a_hook_raises_after_an_error_that_was_told_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("first")
    tell(error, 2, "node", 5)
    uncaught(error)
    told, _, then = capsys.readouterr().err.partition("ValueError: first\n")
    assert told.startswith("[rank 2] failed (node, step 5):")
    assert then.startswith("[rank 2] in handling it: KeyError: 'in a hook' (line ") and then.count("\n") == 1


def test_what_a_hook_raises_on_a_rank_that_follows_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("Connection closed by peer")
    mark_told(error)
    uncaught(error)
    assert capsys.readouterr().err == ""


def test_an_error_that_follows_none_is_reported_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    mark_told(ValueError("another"))
    uncaught(ValueError("first"))
    assert "in a hook" in capsys.readouterr().err


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError("no message")


def test_a_message_of_any_kind_is_told_in_a_line() -> None:
    assert described(ValueError("first\nsecond")) == "ValueError: first"
    assert described(ValueError()) == "ValueError"
    assert described(Speechless()) == "Speechless: (its message cannot be made)"
    long = described(ValueError(f"begins {'x' * 10_000_000} ends"))
    assert len(long) < 1100 and long.startswith("ValueError: begins x") and long.endswith("x ends")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_a_terminal_has_no_characters_for_is_told(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stderr", written)
    tell(ValueError("a file \udcff, größer"), 1, "node", 5)
    text = written.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert r"ValueError: a file \udcff, gr\xf6\xdfer" in text and text.startswith("[rank 1] failed")
