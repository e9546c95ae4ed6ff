"""How ranks find each other: torch's store, in which they compare what process groups need before there are any."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from lightning_tex.resilience.agreement import Agreement, Comparison

# With it torchrun makes a store for every attempt.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

# Processes start minutes apart on a busy host: a timeout of collectives is not meant for them, unless it is longer.
_LATEST = timedelta(minutes=5)


def meet(address: str, port: int, rank: int, world: int, timeout: timedelta, alike: Mapping[str, str]) -> Store:
    """Wait for all ranks, and compare what their process groups take alike; called by all of them.

    Args:
        address, port: of the store, which rank 0 has unless torchrun has it.
        rank: this process's.
        world: ranks.
        timeout: of collectives; ranks are waited for as long, and five minutes at least.
        alike: what all ranks must have, by name.

    Returns:
        the store, for ``init_process_group``.

    Raises:
        RuntimeError: on every rank that has come: who has not, or what differs.
        DistStoreError: rank 0 or torchrun cannot be reached.
    """
    latest = max(timeout, _LATEST)
    store = _store(address, port, rank, world, latest)
    remedy = "Give every rank the same options and environment"
    comparison = Comparison("the start of its process group", alike, "ranks do not agree", remedy, {})
    Agreement(store, rank, range(world), latest, "rendezvous").require(comparison)
    return store


def _store(address: str, port: int, rank: int, world: int, timeout: timedelta) -> Store:
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        address,
        port,
        world,
        is_master=rank == 0 and not of_torchrun,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=not of_torchrun,
    )
    return _of_this_attempt(store) if of_torchrun else store


def _of_this_attempt(store: Store) -> Store:
    """A part of torchrun's store in which no earlier attempt has left its addresses.

    torchrun's agent shares one store with all attempts of a run, and ranks that are started again read the addresses of
    those that have gone (pytorch#135712). On one node the number of restarts tells attempts apart; over several nodes
    each counts its own, and the user has to ask for a store for each.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return store
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        if os.environ["RANK"] == "0":
            warnings.warn(
                "torchrun --max-restarts over several nodes recovers nothing: ranks that are started again look for "
                f"those that have gone. Set {OWN_STORE}=1 on all nodes",
                stacklevel=2,
            )
        return store
    return PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
