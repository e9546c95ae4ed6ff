"""The options of a command are dataclasses: jsonargparse reads them, under the spelling that LightningCLI has.

``--tensor_parallel_size 2``, ``--json``, ``--elements 1e5 1e6``. Dashes within a name (``--tensor-parallel-size``),
which version 0.1 had, mean the same. What is wrong is one line: the option, what was given, and what is legal.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, register_type

from lightning_tex.cli.tables import print_json
from lightning_tex.parallel.errors import UserValueError

HELP = {"-h", "--help"}
_MISSING = "the following arguments are required:"  # argparse's words


class Count(int):
    """A whole number of at least 1, also written as ``1e6``."""

    @classmethod
    def parse(cls, text: Any) -> Count:
        """Raises ValueError for anything else."""
        number = float(text)
        if number < 1 or number != int(number):
            raise ValueError(f"{text} is no whole number of at least 1")
        return cls(number)


register_type(Count, serializer=int, deserializer=Count.parse, deserializer_exceptions=(ValueError, OverflowError))


# Where something is measured.
Device = Literal["cpu", "cuda"]


def device_of(wanted: Device | None) -> torch.device:
    """The device that is asked for; left out: CUDA if torch sees one, the launcher's for this process.

    Raises:
        UserValueError: there is no such device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserValueError("--device cuda, but torch sees no CUDA device; legal: cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


_WORDS = {
    Count: "a whole number of at least 1, such as 4 or 1e6",
    PositiveFloat: "a number above 0",
    int: "a whole number",
    float: "a number",
    bool: "true, false",
    str: "a word",
    Path: "a path",
}


@dataclass(frozen=True)
class _Output:
    """What is printed.

    Args:
        json: print one JSON object as the last line.
    """

    json: bool = False


@dataclass(frozen=True)
class Command:
    """A command whose options are dataclasses.

    Args:
        name: as it is typed, such as ``bench optimizer``.
        action: takes an object of each dataclass and, if the command takes a recipe, the words that are the recipe's.
            What it prints is for people; it returns what ``--json`` prints, or ``None`` on all ranks but the first.
            The first paragraph of its docstring is what ``--help`` says.
        options: the dataclasses.
        takes_recipe: whether words that are no options of its own are the recipe's; otherwise they are refused.
        takes_path: whether what the dataclasses have no default for is given as plain words, before the recipe's.
    """

    name: str
    action: Callable[..., Mapping[str, Any] | None]
    options: tuple[type, ...]
    takes_recipe: bool = False
    takes_path: bool = False

    @property
    def description(self) -> str:
        """What the command does."""
        action = getattr(self.action, "func", self.action)  # of a partial
        return (inspect.getdoc(action) or "").partition("\n\n")[0].replace("\n", " ")

    def __call__(self, words: Sequence[str]) -> Mapping[str, Any] | None:
        """Run it; the action's report.

        Args:
            words: what follows the command's name.

        Raises:
            UserError: an option that does not exist, is missing, or has a value that is not legal; and what the action
                finds wrong.
        """
        (*options, output), rest = self.parse(words)
        report = self.action(*options, rest) if self.takes_recipe else self.action(*options)
        if output.json and report is not None:
            print_json(report)
        return report

    def unknown(self, words: Sequence[str]) -> str:
        """What is said of words that are none of its options, with the option nearest to the first of them."""
        legal = [option for kind in (*self.options, _Output) for option in get_type_hints(kind)]
        nearest = "".join(f"nearest: --{option}; " for option in get_close_matches(_name(words[0]), legal, 1))
        return f"unknown: {' '.join(words)}; {nearest}`lightning-tex {self.name} --help` lists the options"

    def parse(self, words: Sequence[str]) -> tuple[list[Any], list[str]]:
        """An object of each dataclass, what is printed, and the words that are the recipe's."""
        kinds = (*self.options, _Output)
        usage = f"lightning-tex {self.name} {'PATH ' if self.takes_path else ''}[--OPTION VALUE ...]"
        parser = ArgumentParser(exit_on_error=False, usage=usage, description=self.description)
        hints: dict[str, Any] = {}
        for kind in kinds:
            parser.add_class_arguments(kind, as_positional=self.takes_path)
            hints |= get_type_hints(kind)
        given, rest = _split(words, hints)
        if HELP & set(rest):
            parser.parse_args(["--help"])
        plain: list[str] = []
        if self.takes_path:
            plain = list(takewhile(lambda word: not word.startswith("-"), rest)) if self.takes_recipe else rest
            rest = rest[len(plain) :]
        if self.takes_recipe:  # whose options have dots: a word without is nearly one of these, or one of few
            unknown = [word for word in rest if _is_nearly_one_of(word, hints)]
        else:
            unknown = [word for word in (*plain, *rest) if word.startswith("-") or not self.takes_path]
        if unknown:
            raise UserValueError(self.unknown(unknown))
        try:
            parsed = parser.parse_args([*plain, *(_word(name, values, hints[name]) for name, values in given)])
        except ArgumentError as error:
            raise UserValueError(_one_line(str(error), dict(given), hints, self.takes_path)) from None
        values = {name: _plain(value) for name, value in parsed.as_dict().items()}
        return [kind(**{name: values[name] for name in get_type_hints(kind)}) for kind in kinds], rest


def _plain(value: Any) -> Any:
    """Without our own kind of int, which nothing after the parser needs to know."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return int(value) if isinstance(value, Count) else value


def _split(words: Sequence[str], hints: Mapping[str, Any]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The options' names, underscored, with the values given to them; and all other words."""
    given: list[tuple[str, list[str]]] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        name = _name(word)
        if not flag.startswith("--") or name not in hints:
            rest.append(word)
            continue
        values = [value] if equals else []
        most = len(left) if _is_list(hints[name]) else 1
        if hints[name] is bool and left[:1] and left[0].lower() not in ("true", "false"):
            most = 0
        while not equals and left and len(values) < most and not left[0].startswith("--"):
            values.append(left.pop(0))
        given.append((name, [*dict(given).get(name, []), *values] if flag.endswith("+") else values))
    return given, rest


def _name(word: str) -> str:
    """Of an option, underscored."""
    return word.partition("=")[0].removeprefix("--").removesuffix("+").replace("-", "_")


def _is_nearly_one_of(word: str, names: Iterable[str]) -> bool:
    return word.startswith("--") and "." not in word and bool(get_close_matches(_name(word), names, 1, cutoff=0.85))


def _word(name: str, values: list[str], hint: Any) -> str:
    """An option as jsonargparse reads it: a list in brackets, a switch with its value."""
    if hint is bool and not values:
        values = ["true"]
    if not values:
        return f"--{name}"
    listed = _is_list(hint) and not values[0].startswith("[")
    return f"--{name}={json.dumps(values) if listed else values[0]}"


def _is_list(hint: Any) -> bool:
    return any(get_origin(kind) is list for kind in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Of ``A | None``: A."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for kind in get_args(hint) if kind is not NoneType)
    return (hint,)


def _one_line(message: str, given: Mapping[str, list[str]], hints: Mapping[str, Any], takes_path: bool) -> str:
    key = re.match(r'Parser key "(\w+)"|argument --(\w+)', message)
    name = key and (key[1] or key[2])
    if message.startswith(_MISSING):
        missing = message.removeprefix(_MISSING).strip()
        return f"{'PATH' if takes_path else f'--{missing}'} is needed"
    if not name or name not in given:
        return " ".join(message.split())
    legal = ", or ".join(map(_legal, _alternatives(hints[name])))
    return f"{' '.join([f'--{name}', *given[name]])}; legal: {legal}"


def _legal(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"{_legal(get_args(hint)[0])}; one or more"
    return _WORDS[hint]


def run_one_of(name: str, commands: Sequence[Command], words: Sequence[str]) -> None:
    """Run the command of a group that the first word names, with the words after it; ``--help`` lists them.

    Args:
        name: of the group.
        commands: of the group; the last word of a name tells them apart.
        words: what follows the group's name.

    Raises:
        UserError: it is none of these; and what the command finds wrong.
    """
    by_name = {command.name.split()[-1]: command for command in commands}
    first = words[0] if words else ""
    if first in HELP:
        print(f"usage: lightning-tex {name} {{{','.join(by_name)}}} [--OPTION VALUE ...]\n")
        for word, command in by_name.items():
            print(f"  {word:15} {command.description.partition('. ')[0].removesuffix('.')}")
    elif first in by_name:
        by_name[first](words[1:])
    else:
        raise UserValueError(f"`lightning-tex {name}` of {first or 'nothing'}; legal: {', '.join(by_name)}")
