"""What torchrun's restarts need: ranks of a later attempt find each other, and not those of an earlier one."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.constants import default_pg_timeout

# With it torchrun makes a store for every attempt.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def store_of_this_attempt(timeout: timedelta | None) -> Store | None:
    """A store in which no earlier attempt has left its addresses; ``None``: what torch makes is one.

    torchrun's agent shares one store with all attempts of a run, and ranks that are started again read the addresses of
    those that have gone (pytorch#135712). On one node the number of restarts tells attempts apart; over several nodes
    each counts its own, and the user has to ask for a store for each.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return None
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        if os.environ["RANK"] == "0":
            warnings.warn(
                "torchrun --max-restarts over several nodes recovers nothing: ranks that are started again look for "
                f"those that have gone. Set {OWN_STORE}=1 on all nodes",
                stacklevel=2,
            )
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=False, timeout=timeout or default_pg_timeout)
    return PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
