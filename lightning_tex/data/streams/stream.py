"""A source as a stream in parts: its training batches, what is held out of it, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_tex.data.corpus import Source, fingerprint
from lightning_tex.data.local_files import builder_of, named_files
from lightning_tex.data.order import Share
from lightning_tex.data.packing import Batch
from lightning_tex.data.resume import Positions
from lightning_tex.data.streams.evaluation import HeldOutRows
from lightning_tex.data.streams.held_out import NOTHING, HeldOutDocuments, divided
from lightning_tex.data.streams.loader import PartRows, States, StreamLoader
from lightning_tex.data.streams.order import StreamOrder
from lightning_tex.data.streams.parts import PartBlocks, PartDocuments, PartState
from lightning_tex.data.streams.shards import DatasetShards, shards_of
from lightning_tex.data.tokenizer import TextTokenizer
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.flight_record import TRAINING


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
        held_out: documents to validate on, and (or None) to test on, by these names.
    """

    def __init__(
        self, source: Source, parts: int, seed: int, buffer: int, cache_dir: Path, hub_cache_dir: Path | None
    ) -> None:
        self.source = source
        files = named_files(builder_of(str(source.path), source.data_files)[1])
        self._files = fingerprint([f"{file.name}:{file.stat().st_size}" for file in files])
        documents, validation, test = source.undivided(cache_dir, hub_cache_dir)
        self.shards, left_out = shards_of(source, documents), NOTHING
        self.held_out = {
            "validation": _all_of(validation, source, source.validation_split or "validation"),
            "test": _all_of(test, source, source.test_split),
        }
        if validation is None:
            self.shards, left_out, self.held_out["validation"] = divided(self.shards, source.held_out_stride())
        self.order = StreamOrder(parts, self.shards.count, seed, buffer, left_out)
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

    def evaluation(self, name: str, tokenizer: TextTokenizer, sequence_length: int, share: Share) -> HeldOutRows:
        """A data rank's rows of documents that are held out."""
        documents = self.held_out[name]
        assert documents is not None
        return HeldOutRows(documents, self.order.parts, tokenizer, sequence_length, share, self.source.reading)

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
        order = self.order
        parts = {"stream_parts": order.parts, "shuffle_buffer": order.buffer, "shards": order.shards}
        return {"files": self._files, **parts}


def _all_of(documents: Any, source: Source, split: str | None) -> HeldOutDocuments | None:
    if documents is None:
        return None
    return HeldOutDocuments(DatasetShards(documents, f"path={source.path!r}, split={split!r}"), None)


def _of_all_ranks(states: States, trainer: Any) -> Sequence[States]:
    if trainer is None or trainer.world_size == 1 or not dist.is_initialized():
        return [states]
    every: list[Any] = [None] * trainer.world_size
    host_of = getattr(trainer.strategy, "host_axis", None)
    if host_of is None:  # a strategy of Lightning's own
        dist.all_gather_object(every, states)
        return every
    host = host_of()
    with TRAINING.inside("all_gather of an object", host):
        dist.all_gather_object(every, states, group=host.group)
    return every
