"""Options by their whole names: of one that does not exist the nearest that does is told."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

# Options of a fit that are read before the recipe is.
_OF_THE_COMMAND_LINE = ["restarts"]


class OptionParser(LightningArgumentParser):
    """Takes options by their whole names only, and tells of one that does not exist the nearest that does.

    A class's own options are read by a parser of this kind for itself, whose message comes to the outer one.
    """

    _REFUSED = re.compile(
        r"unrecognized arguments: --([^\s=]+)|Option '(.+)' is not accepted|Group '(.+)' does not accept option '(.+)'"
        r"|Subcommand '.+' does not accept option '(.+)'"
    )
    _UNKNOWN = re.compile(r"unknown option --(\S+?)(?:; nearest: --(\S+))?$", re.MULTILINE)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """As text; what has been parsed has been checked."""
        return super().dump(*args, **{"skip_validation": True, **kwargs})

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`dump`, to a file."""
        super().save(*args, **{"skip_validation": True, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.search(r'Parser key "([\w.]+)"', message)
        prefix = f"{key[1]}." if key else ""
        if unknown := self._UNKNOWN.search(message):
            name, nearest = unknown.groups()
        elif refused := self._REFUSED.search(message):
            name = ".".join(filter(None, refused.groups()))
            parser = getattr(ex, "subcommand_parser", self)
            legal = [option.removeprefix("--") for option in parser._option_string_actions]
            legal += _OF_THE_COMMAND_LINE
            nearest = next(iter(get_close_matches(name, legal, 1)), None)
        else:
            super().error(message, ex)
        told = f"unknown option --{prefix}{name}" + (f"; nearest: --{prefix}{nearest}" if nearest else "")
        super().error(told, ex)
