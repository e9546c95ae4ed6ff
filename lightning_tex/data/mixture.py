"""``MixtureDataModule``: text and conversations of several sources, mixed by weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader

from lightning_tex.data.chat.template import end_of_text, tokenizer_config
from lightning_tex.data.corpus import fingerprint
from lightning_tex.data.loader import ResumableLoader
from lightning_tex.data.mixing import BySource, Mixture, MixtureSampler, NamedMixture, Weights
from lightning_tex.data.mixture_sources import ChatSource, DocumentsApart, MixtureSource, TextSource, weights_of
from lightning_tex.data.order import Share
from lightning_tex.data.packing import Batch, Samples, by_document
from lightning_tex.data.prepared import Notes, Prepared, Preparing, build_once, mark_as_cache
from lightning_tex.data.resume import Cursor
from lightning_tex.data.text import known_vocab_size
from lightning_tex.data.token_data import TokenDataModule
from lightning_tex.data.tokenizer import TRAINING_BYTES, TextTokenizer, texts_of, tokenizer_file, train_bpe
from lightning_tex.parallel.errors import UserTypeError, UserValueError, require_choice

_FORMAT = "1"  # raise it when the same settings no longer give the same files


class MixtureDataModule(TokenDataModule):
    """Sources of text and of conversations: of every micro-step each has its share, by weights, constant or not.

    Which samples a micro-step holds is a function of the seed and the micro-step, counted from the beginning of the
    run, on every layout. Of each source the samples come in the order of its own epochs: it begins anew when it has
    been read, whatever the others do. What Lightning takes for an epoch is as many micro-steps as all sources have
    samples for. Validation reads all that is held out, source by source: a global batch is of one, whose name it has as
    ``source``, by which :class:`~lightning_tex.LanguageModel` logs ``val_loss/{source}`` beside the mean over all.

    Batches are as of :class:`TextDataModule`; the ``sample`` of a source is counted from the end of the one before.

    Args:
        sources: by name, text or conversations, which need a tokenizer and document_mask.
        tokenizer: as of :class:`TextDataModule`. None: train a byte-level BPE on equal parts of the sources.
        vocab_size: as there.
        end_of_document: as there.
        sequence_length: tokens a sample predicts.
        global_batch_size: sequences of one micro-step over the whole data axis.
        seed: of the sample order.
        num_workers: processes that read ahead.
        num_proc: processes that prepare the data, once; None: as many as there are processors.
        cache_dir: of prepared data; as of :class:`TextDataModule`.
        document_mask: documents of one block do not see each other.

    Raises:
        ValueError: options that contradict each other or the data, naming what is legal.
        FileNotFoundError: no such tokenizer or data.
    """

    def __init__(
        self,
        sources: dict[str, TextSource | ChatSource],
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        end_of_document: str | None = None,
        sequence_length: int = 128,
        global_batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        document_mask: bool = False,
    ) -> None:
        if not sources:
            raise UserValueError("sources={} has none; legal: at least one")
        for name, source in sources.items():
            if not isinstance(source, MixtureSource):
                raise UserTypeError(f"source {name!r} is {type(source).__name__}; legal: TextSource, ChatSource")
        require_choice("document_mask", document_mask, (True, False))
        chats = [name for name, source in sources.items() if isinstance(source, ChatSource)]
        if chats and (tokenizer is None or not document_mask):
            raise UserValueError(
                f"source {chats[0]!r} is of conversations, tokenizer={tokenizer!r} and document_mask={document_mask}; "
                "legal: a tokenizer, and document_mask=True"
            )
        self.weights = Weights(weights_of(sources))
        size = known_vocab_size(tokenizer, vocab_size, end_of_document)
        preparation = MixturePreparation(
            dict(sources), None if tokenizer is None else str(tokenizer), size, end_of_document, sequence_length
        )
        super().__init__(
            preparation, size, sequence_length, global_batch_size, seed, num_workers, num_proc, cache_dir
        )  # fmt: skip
        self.document_mask = document_mask

    def train_dataloader(self) -> ResumableLoader:
        """Loader of this data rank's training batches."""
        before = (self._loaded or {}).get("sources", {})
        for name, now in self._fingerprints().items():
            if name in before and before[name]["fingerprint"] != now:
                raise UserValueError(
                    f"source {name!r} has changed: fingerprint {now}, in the checkpoint {before[name]['fingerprint']}; "
                    "resume with the checkpoint's data, or start a new run from its weights"
                )
        return super().train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: micro-steps of the whole run, and of each source what has been read."""
        state = super().state_dict()
        if self._loaded is not None:
            return state
        step = state["samples"] // self.global_batch_size
        if state["epoch"]:
            assert self._cursor is not None
            step += state["epoch"] * (self._cursor.period() or len(self._sampler(Share(self.global_batch_size))))
        drawn = self._sampler(Share(self.global_batch_size)).drawn(step).tolist()
        prints, sizes = self._fingerprints(), map(len, self._mixture("train").sources)
        sources = {
            name: {"fingerprint": prints[name], "drawn": count, "epoch": count // size}
            for name, count, size in zip(prints, drawn, sizes, strict=True)
        }
        return {**state, "epoch": 0, "samples": step * self.global_batch_size, "sources": sources}

    def alike_on_all_ranks(self) -> dict[str, Any]:
        return {**super().alike_on_all_ranks(), "document_mask": self.document_mask}

    @property
    def _collate(self) -> Callable[[Any], Batch]:
        if not self.document_mask or cast(PreparedMixture, self.prepared).apart:
            return super()._collate
        return partial(by_document, end_of_document_id=self.end_of_document_id)

    def _train_loader(self, share: Share) -> ResumableLoader:
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return super()._train_loader(share)
        train = self._mixture("train")
        for name, samples in zip(train.names, train.sources, strict=True):
            if not len(samples):
                raise UserValueError(
                    f"source {name!r} has fewer training tokens than one block of {self.sequence_length + 1}; legal: "
                    "more text, or a smaller sequence_length"
                )
        return self._resumable(self._enough(train), self._sampler(share))

    def _evaluation_loader(self, part: str) -> DataLoader:
        mixture = NamedMixture(dict(zip(self._mixture(part).names, self._mixture(part).sources, strict=True)))
        return self._loader(mixture, BySource(mixture, self._share()))

    def _cursor_of(self, loader: ResumableLoader) -> Cursor:
        if self._loaded is not None and self.trainer is None:  # a Trainer's cursor knows how long its epochs are
            epoch, batch = divmod(self._loaded["samples"] // self.global_batch_size, len(loader))
            self._loaded = {**self._loaded, "epoch": epoch, "samples": batch * self.global_batch_size}
        return super()._cursor_of(loader)

    def _sampler(self, share: Share) -> MixtureSampler:
        return MixtureSampler(
            self._mixture("train"), share, self.weights, self.seed, list(self._fingerprints().values())
        )  # fmt: skip

    def _mixture(self, part: str) -> Mixture:
        return cast(Mixture, getattr(self.prepared, part))

    def _fingerprints(self) -> dict[str, str]:
        return {name: one.fingerprint for name, one in cast(PreparedMixture, self.prepared).sources.items()}


@dataclass(frozen=True)
class MixturePreparation(Preparing):
    """All that decides what a mixture is of."""

    sources: dict[str, MixtureSource]
    tokenizer: str | None
    vocab_size: int
    end_of_document: str | None
    sequence_length: int

    def run(self, cache_dir: Path, hub_cache_dir: Path | None, processes: int | None = None) -> PreparedMixture:
        mark_as_cache(cache_dir)
        tokenizer = str(self._tokenizer_dir(cache_dir, hub_cache_dir))
        each = {
            name: one.run(cache_dir, hub_cache_dir, processes) for name, one in self._preparations(tokenizer).items()
        }
        Notes(cache_dir, asdict(self)).write({"tokenizer": tokenizer})
        return PreparedMixture(self, each)

    def open(self, cache_dir: Path) -> PreparedMixture | None:
        note = Notes(cache_dir, asdict(self)).read()
        if note is None:
            return None
        opened = {name: one.open(cache_dir) for name, one in self._preparations(note["tokenizer"]).items()}
        there = {name: one for name, one in opened.items() if one is not None}
        return PreparedMixture(self, there) if len(there) == len(opened) else None

    @property
    def has_conversations(self) -> bool:
        """Whether some source is of conversations."""
        return any(isinstance(source, ChatSource) for source in self.sources.values())

    def _preparations(self, tokenizer: str) -> dict[str, Preparing]:
        end = self.end_of_document
        if end is None and self.has_conversations:  # the same one in all sources
            end = end_of_text(tokenizer_config(self.tokenizer))
        # By its own name: where the hub's client keeps files, nothing else of the tokenizer lies beside them.
        name_of_tokenizer = self.tokenizer or tokenizer
        return {
            name: source.preparing(name_of_tokenizer, self.vocab_size, end, self.sequence_length)
            for name, source in self.sources.items()
        }

    def _tokenizer_dir(self, cache_dir: Path, hub_cache_dir: Path | None) -> Path:
        if self.tokenizer is not None:
            return tokenizer_file(self.tokenizer).resolve()
        sources = {name: source.source() for name, source in self.sources.items()}
        loaded = {name: source.load(cache_dir / "sources", hub_cache_dir) for name, source in sources.items()}

        def build(folder: Path) -> None:
            texts = (text for one in loaded.values() for text in _some_of(texts_of(one.train), len(loaded)))
            train_bpe(texts, self.vocab_size).save(str(folder / "tokenizer.json"))

        keys = [one.key for one in loaded.values()]
        key = fingerprint([_FORMAT, "mixture", *keys, str(self.vocab_size), repr(sources)])
        return build_once(cache_dir / "tokenizers" / key, build)


def _some_of(texts: Iterator[str], sources: int) -> Iterator[str]:
    left = TRAINING_BYTES // sources
    for text in texts:
        if left <= 0:
            return
        left -= len(text.encode("utf-8", "replace"))
        yield text


class PreparedMixture(Prepared):
    """Prepared sources; the fingerprint is of theirs and of the weights.

    Attributes:
        apart: whether samples tell documents apart, since some are conversations.
    """

    def __init__(self, preparation: MixturePreparation, sources: dict[str, Any]) -> None:
        self.sources = sources
        self.tokenizer: TextTokenizer = next(iter(sources.values())).tokenizer
        self.apart = preparation.has_conversations
        weights = weights_of(preparation.sources)
        named = {name: (one.fingerprint, weights[name]) for name, one in sources.items()}
        self.fingerprint = fingerprint([json.dumps(named)])
        of_text = {name for name, source in preparation.sources.items() if isinstance(source, TextSource)}

        def samples(name: str, part: Samples) -> Samples:
            return DocumentsApart(part, self.tokenizer.end_of_document_id) if self.apart and name in of_text else part

        self.train = Mixture({name: samples(name, one.train) for name, one in sources.items()})
        self.validation = Mixture({name: samples(name, one.validation) for name, one in sources.items()})

    def describe(self) -> list[str]:
        return [f"{name}, {line}" for name, one in self.sources.items() for line in one.describe()]
