"""A fit before ranks are forked: what a process's first one loads and remembers, each of them would find out anew."""

from __future__ import annotations

import os
import warnings
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.behaviour_modules import PublicNames, batches, loader
from helpers.trainers import quiet
from lightning_tex import TexMoEStrategy
from lightning_tex.recipe import quiet as unadvised


def fit_once() -> None:
    """Take a step under both strategies, in a pretended process group: a true one has threads, which forks break."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with (
            unadvised(),
            warnings.catch_warnings(action="ignore"),
            patch.dict(os.environ),
            torch.random.fork_rng(devices=[]),
        ):
            for strategy in ("auto", TexMoEStrategy()):
                trainer = quiet(devices=1, strategy=strategy, max_epochs=1, precision="64-true")
                trainer.fit(PublicNames(), loader(batches(1)))
    finally:
        dist.destroy_process_group()
