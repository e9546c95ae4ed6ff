"""The command line, ``lightning-tex`` = ``python -m lightning_tex``."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_tex import __version__
from lightning_tex.cli.options import HELP
from lightning_tex.cli.restarts import asks_for_restarts, fit_with_restarts
from lightning_tex.parallel.errors import UserError, UserValueError, is_consequence, left_by_another_rank
from lightning_tex.recipe import DEFAULTS, TexCLI, cli_of
from lightning_tex.resilience.telling import is_told, told_in_one_line

# Those that are not the Trainer's: the module whose ``main`` takes the words after the command. Imported when it is
# called, since some take seconds.
COMMANDS = {
    "plan": "lightning_tex.cli.plan",
    "plan --trace": "lightning_tex.cli.trace",
    "prepare": "lightning_tex.cli.prepare",
    "data": "lightning_tex.cli.data",
    "bench": "lightning_tex.cli.bench",
    "checkpoint": "lightning_tex.cli.checkpoint",
    "export": "lightning_tex.cli.export",
    "upcycle": "lightning_tex.cli.upcycle",
    "experts": "lightning_tex.cli.experts",
    "verify": "lightning_tex.cli.verify",
    "replay": "lightning_tex.cli.replay",
}


# What the user can put right.
_USER_ERRORS = (UserError, MisconfigurationException, OSError)


def main(args: ArgsType = None) -> None:
    """Run ``lightning-tex``; ``--help`` lists the commands.

    What the user can put right (a wrong option, layout or file) ends in one line per failing rank and exit code 2, as
    the parser's own errors do; everything else keeps its traceback. A rank that another one left says only that.

    Args:
        args: command-line words; ``None``: the process's own.
    """
    # Lightning 2.6's own call, deprecated by torch 2.13; nothing a user could act on.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        with told_in_one_line(*_USER_ERRORS):
            _run(args)
    except (*_USER_ERRORS, RuntimeError) as error:
        # What another rank has caused may go well when it is begun again (``--restarts``).
        code = 2 if isinstance(error, _USER_ERRORS) and not is_consequence(error) else 1
        if is_told(error):
            raise SystemExit(code) from None
        # Every rank tells: the fault may be one rank's own, or rank 0 already ended by its launcher.
        rank = getattr(rank_zero_only, "rank", 0)
        if left_by_another_rank(error):
            print(
                f"[rank {rank}] ended: another rank has closed its connection; see that rank's error", file=sys.stderr
            )
            raise SystemExit(code) from None
        if not isinstance(error, _USER_ERRORS):
            raise
        print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None


def _run(args: ArgsType) -> None:
    words = sys.argv[1:] if args is None else args
    _find_modules_beside(words if isinstance(words, list) else [])
    if not isinstance(words, list):  # a configuration for LightningCLI
        TexCLI(**DEFAULTS, args=args)
        return
    first = words[0] if words else ""
    if first in COMMANDS:
        import_module(COMMANDS[first]).main(words[1:])
    elif first in HELP:
        print(_overview())
    elif first == "--version":
        print(f"lightning-tex {__version__}")
    elif first == "fit" and asks_for_restarts(words):
        raise SystemExit(fit_with_restarts(words))
    elif first in TexCLI.subcommands():
        cli_of(first)(**DEFAULTS, args=args)
    elif not (first.startswith("-") and TexCLI.subcommands().keys() & set(words)):
        raise UserValueError(_unknown(words))
    else:
        TexCLI(**DEFAULTS, args=args)


def _find_modules_beside(words: list[str]) -> None:
    """Let modules be imported from the working folder, as ``python -m`` does, and from the folders of recipes."""
    joined = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    recipes = [path for word, path in pairwise(words) if word == "--config"]
    for folder in [Path.cwd(), *(Path(path).resolve().parent for path in [*recipes, *joined])]:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _overview() -> str:
    """Every command, and the first sentence of what it says of itself."""
    said = {name: inspect.getdoc(getattr(Trainer, name)) or "" for name in TexCLI.subcommands()}
    said |= {name: _docstring(module).partition(": ")[2] for name, module in COMMANDS.items()}
    lines = ["usage: lightning-tex COMMAND [--OPTION VALUE ...]", ""]
    for name, text in said.items():
        lines.append(f"  {name:14} {' '.join(text.split()).partition('. ')[0].removesuffix('.')}")
    lines += ["", "`lightning-tex COMMAND --help` lists its options, `lightning-tex --version` prints the version."]
    return "\n".join(lines)


def _docstring(module: str) -> str:
    """A module's, without importing it."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""


def _unknown(words: list[str]) -> str:
    word = words[0] if words else ""
    names = [*TexCLI.subcommands(), *COMMANDS]
    legal = f"legal: {', '.join(names)}"
    if not word or word.startswith("-"):
        later = next((name for name in COMMANDS if name in words), None)
        if later is not None:
            others = " ".join(other for other in words if other != later)
            return f"the command comes first: lightning-tex {later} {others}"
        return f"a command is needed, before its options; {legal}"
    by_last_word = {name.split()[-1].removeprefix("--"): name for name in names}
    nearest = [by_last_word[last] for last in get_close_matches(word, by_last_word, 1)]
    return f"unknown command {word}; {''.join(f'nearest: {name}; ' for name in nearest)}{legal}"
