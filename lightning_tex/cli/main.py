"""The command line, ``lightning-tex`` = ``python -m lightning_tex``."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_tex.parallel.errors import UserError, left_by_another_rank
from lightning_tex.recipe import DEFAULTS, TexCLI

# Those that are not the Trainer's: the module whose ``main`` takes the words after the command. Imported when it is
# called, since some take seconds.
COMMANDS = {
    "plan": "lightning_tex.cli.plan",
    "bench": "lightning_tex.cli.bench",
    "checkpoint": "lightning_tex.cli.checkpoint",
    "verify": "lightning_tex.cli.verify",
    "replay": "lightning_tex.cli.replay",
}


def main(args: ArgsType = None) -> None:
    """Run ``lightning-tex fit|validate|test|predict|plan|verify|bench|checkpoint|replay``.

    What the user can put right (a wrong option, layout or file) ends in one line per failing rank and exit code 2, as
    the parser's own errors do; everything else keeps its traceback. A rank that another one left says only that.

    Args:
        args: command-line words; ``None``: the process's own.
    """
    # Lightning 2.6's own call, deprecated by torch 2.13; nothing a user could act on.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and words and words[0] in COMMANDS:
            import_module(COMMANDS[words[0]]).main(words[1:])
        else:
            TexCLI(**DEFAULTS, args=args)
    except (UserError, MisconfigurationException, OSError, RuntimeError) as error:
        # Every rank tells: the fault may be one rank's own, or rank 0 already ended by its launcher.
        rank = getattr(rank_zero_only, "rank", 0)
        if left_by_another_rank(error):
            print(
                f"[rank {rank}] ended: another rank has closed its connection; see that rank's error", file=sys.stderr
            )
            raise SystemExit(1) from None
        if not isinstance(error, UserError | MisconfigurationException | OSError):
            raise
        print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
