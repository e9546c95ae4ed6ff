"""A source as a stream in parts: its training batches, what is held out of it, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_tex.data.corpus import Source, builder_of, fingerprint
from lightning_tex.data.damage import named_files
from lightning_tex.data.order import Share
from lightning_tex.data.packing import Batch
from lightning_tex.data.resume import Positions
from lightning_tex.data.streams.held_out import NOTHING, divided
from lightning_tex.data.streams.loader import PartRows, States, StreamLoader
from lightning_tex.data.streams.order import StreamOrder
from lightning_tex.data.streams.parts import PartBlocks, PartDocuments, PartState
from lightning_tex.data.streams.shards import shards_of
from lightning_tex.data.tokenizer import TextTokenizer
from lightning_tex.parallel.errors import UserValueError


class StreamInParts:
    """A stream whose parts are read independently of each other.

    Args:
        source: to read.
        parts: P.
        seed: of the shuffles.
        buffer: documents of a part that are shuffled among each other; 0: none.
        cache_dir, hub_cache_dir: as of :meth:`Source.load`.

    Attributes:
        order: of the training documents.
        validation: documents, held out or of a split of their own.
    """

    def __init__(
        self, source: Source, parts: int, seed: int, buffer: int, cache_dir: Path, hub_cache_dir: Path | None
    ) -> None:
        self.source = source
        documents, self.validation = source.undivided(cache_dir, hub_cache_dir)
        self.shards, held_out = shards_of(source, documents), NOTHING
        if self.validation is None:
            self.shards, held_out, self.validation = divided(self.shards, source.held_out_stride())
        self.order = StreamOrder(parts, self.shards.count, seed, buffer, held_out)
        self.positions: Positions | None = None
        self._loaded: States | None = None

    def loader(
        self,
        tokenizer: TextTokenizer,
        sequence_length: int,
        share: Share,
        collate: Callable[[Batch], Batch],
        num_workers: int,
        pin_memory: bool,
    ) -> StreamLoader:
        """Of a data rank's batches, from where the last one stands, or :meth:`begin` lets it."""
        blocks = PartBlocks(PartDocuments(self.shards, self.order), tokenizer, sequence_length)
        rows = PartRows(blocks, self.order, share, collate, self.source.reading)
        return StreamLoader(rows, self.positions, num_workers, pin_memory)

    def begin(self, step: int) -> Positions:
        """Let the parts stand where the loaded state has them, before this micro-step; without, at their beginnings."""
        first = {part: PartState(part) for part in range(self.order.parts)}
        self.positions, self._loaded = Positions(step, self._loaded or first), None
        return self.positions

    def state(self, step: int, trainer: Any) -> dict[str, Any]:
        """Where all parts stand before a micro-step; collective where ranks read different ones.

        Args:
            step: counted from the beginning of the run.
            trainer: of this rank; None: there is one process.
        """
        assert self.positions is not None
        states: States = {}
        for own in _of_all_ranks(self.positions.before(step), trainer):
            states |= own
        return {**self.facts(), "parts": [asdict(states[part]) for part in range(self.order.parts)]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Let the next beginning be where a state was taken.

        Raises:
            ValueError: it is of another order.
        """
        for name, now in self.facts().items():
            if state[name] != now and name == "files":
                raise UserValueError(
                    f"the data set has changed: names or sizes of its files, by fingerprint {now}, in the checkpoint "
                    f"{state[name]}; resume with the checkpoint's data, or start a new run from its weights"
                )
            if state[name] != now:
                raise UserValueError(
                    f"{name}={now} but the checkpoint was trained with {name}={state[name]}; only the latter continues "
                    "with the next sample"
                )
        self._loaded = {part: PartState(**one) for part, one in enumerate(state["parts"])}

    def facts(self) -> dict[str, Any]:
        """What a state is of. Files are local ones; where there are none, documents are compared as they are read."""
        _, data_files, _ = builder_of(self.source)
        files = fingerprint([f"{file.name}:{file.stat().st_size}" for file in named_files(data_files)])
        order = self.order
        return {"files": files, "stream_parts": order.parts, "shuffle_buffer": order.buffer, "shards": order.shards}


def _of_all_ranks(states: States, trainer: Any) -> Sequence[States]:
    if trainer is None or trainer.world_size == 1 or not dist.is_initialized():
        return [states]
    every: list[Any] = [None] * trainer.world_size
    host = getattr(trainer.strategy, "host_axis", None)
    dist.all_gather_object(every, states, group=host().group if host is not None else None)
    return every
