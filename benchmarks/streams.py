"""What a stream in parts costs: to resume late in it, in memory, and of a training step.

    python benchmarks/streams.py [--megabytes 320] [--files 16] [--turns 5]

Text of any size is made of the words of this Python's own sources (``prepare_data.py``), as JSON lines in several files
and in one, and as Parquet. Of each form, in turns: from making the data module to its first batch, at the beginning of
the stream, and with the state of a run that has read 90 % of every part. (That state is made by reading the documents
up to there without tokenising them: it is the one that training to there would have saved.) Then the memory of a
process that reads on and on; and a fit of the quickstart's model in one process, of which the profiler says what the
loader takes beside the step: of the prepared corpus, and of the stream, tokenised in the same process or by a worker.
Medians are printed, means where they are of steps, and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.profilers import SimpleProfiler
from prepare_data import seconds, write_text
from pyarrow import json as arrow_json
from pyarrow import parquet

from lightning_tex import LanguageModel, TexMoEStrategy, TextDataModule
from lightning_tex.data.corpus import standard_library_files
from lightning_tex.data.streams.parts import PartBlocks, PartDocuments, PartState
from lightning_tex.data.streams.stream import StreamInParts
from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.models import DecoderConfig

_PARTS = 8
_QUICKSTART = {"vocab_size": 2048, "sequence_length": 128, "global_batch_size": 16}
_MODEL: dict[str, Any] = {
    "dim": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 512, "max_sequence_length": 128,
    "num_experts": 4, "top_k": 1, "capacity_factor": None, "moe_every": 2, "activation": "swiglu",
    "tie_embeddings": True,
}  # fmt: skip


def forms(place: Path, megabytes: int, files: int) -> dict[str, Path]:
    """The same amount of text in each form."""
    made = {name: place / name for name in ("one file of JSON lines", "files of JSON lines", "files of Parquet")}
    one, several, tables = made.values()
    for folder in made.values():
        folder.mkdir()
    write_text(place / "some.jsonl", max(1, min(10, megabytes // files)))
    lines = (place / "some.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(files):
        file = several / f"{number:02d}.jsonl"
        write_again(file, lines, number, megabytes * 1_000_000 // files)
        table = arrow_json.read_json(file, arrow_json.ReadOptions(block_size=1 << 26))
        parquet.write_table(table, tables / f"{number:02d}.parquet", row_group_size=1000)
    with (one / "all.jsonl").open("wb") as whole:
        for file in sorted(several.iterdir()):
            whole.write(file.read_bytes())
    return made


def write_again(file: Path, lines: list[bytes], number: int, size: int) -> None:
    """A file of documents that differ from those of others and from each other by what they begin with."""
    with file.open("wb") as opened:
        for count in itertools.count():
            line = lines[(count * 7919 + number) % len(lines)]
            size -= opened.write(line.replace(b'"text": "', b'"text": "%d.%d ' % (number, count), 1))
            if size <= 0:
                return


def module(path: Path, place: Path, **options: Any) -> TextDataModule:
    usual: dict[str, Any] = {**_QUICKSTART, "streaming": True, "stream_parts": _PARTS, "shuffle_buffer": 200}
    usual |= {"tokenizer": str(place / "tokenizer.json"), "cache_dir": str(place / "cache")}
    return TextDataModule(str(path), **(usual | options))


def late_state(data: TextDataModule, share: float) -> tuple[dict[str, Any], list[float]]:
    """The state of a run that has read this share of the first epoch of every part; MB of this process after each."""
    state, stream = begun(data)
    parts, sizes = [], []
    for part in range(_PARTS):
        parts.append(asdict(_late(stream, part, share)))
        sizes.append(process_mb())
    return {**state, "samples": 1000 * data.global_batch_size, "stream": {**state["stream"], "parts": parts}}, sizes


def process_mb() -> float:
    """Of memory that this process has."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def begun(data: TextDataModule) -> tuple[dict[str, Any], StreamInParts]:
    iterator = iter(data.train_dataloader())
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    return data.state_dict(), data._in_parts()


def _late(stream: StreamInParts, part: int, share: float) -> PartState:
    documents = PartDocuments(stream.shards, stream.order)
    ends = itertools.takewhile(lambda end: end < stream.order.units, _positions(documents, part))
    wanted = int(share * sum(1 for _ in ends))
    window = next(itertools.islice(documents.windows(PartState(part)), wanted // stream.order.window, None))
    states = PartBlocks(documents, None, 1)._states(window)  # type: ignore[arg-type]
    return replace(states[wanted % len(states)], tokens=1)


def _positions(documents: PartDocuments, part: int) -> Iterator[int]:
    for _, behind in documents._documents(PartState(part)):
        yield behind.position


def resuming(path: Path, place: Path, turns: int) -> dict[str, Any]:
    state, sizes = late_state(module(path, place), 0.9)
    times: dict[str, list[float]] = {"start": [], "resume": []}

    def first_batch(loaded: Any) -> None:
        data = module(path, place)
        if loaded is not None:
            data.load_state_dict(loaded)
        iterator = iter(data.train_dataloader())
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]

    for _ in range(turns):
        times["start"].append(seconds(lambda: first_batch(None)))
        times["resume"].append(seconds(lambda: first_batch(state)))
    medians = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    print(
        f"{path.name}: first batch at 0 in {medians['start_s']:.2f} s, at 90 % in {medians['resume_s']:.2f} s",
        flush=True,
    )
    print(f"  memory after the documents of each part: {', '.join(f'{size:.0f}' for size in sizes)} MB", flush=True)
    return {**medians, "memory_mb": sizes}


def memory(path: Path, place: Path, batches: int) -> list[float]:
    """MB of the process after each quarter."""
    iterator, sizes = iter(module(path, place).train_dataloader()), []
    for _ in range(4):
        for _ in itertools.islice(iterator, batches // 4):
            pass
        sizes.append(process_mb())
    print(
        f"memory after each quarter of {batches:,} batches: {', '.join(f'{size:.0f}' for size in sizes)} MB", flush=True
    )
    return sizes


class Model(LanguageModel):
    def __init__(self) -> None:
        super().__init__(DecoderConfig(vocab_size=_QUICKSTART["vocab_size"], **_MODEL))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def of_a_step(data: TextDataModule, steps: int) -> dict[str, float]:
    """Means of what the loader and the step take, ms."""
    profiler = SimpleProfiler()
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=TexMoEStrategy(), max_steps=steps, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, profiler=profiler,
    )  # fmt: skip
    trainer.fit(Model(), datamodule=data)
    spent = profiler.recorded_durations
    fetching = spent["[_TrainingEpochLoop].train_dataloader_next"][5:]
    stepping = spent["run_training_batch"][5:]
    return {"loader_ms": 1e3 * statistics.mean(fetching), "step_ms": 1e3 * statistics.mean(stepping)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=320)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread in each process
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        report = measure(Path(place), given)
    print(json.dumps(report))


def measure(place: Path, given: argparse.Namespace) -> dict[str, Any]:
    texts = [path.read_text("utf-8", "replace") for path in standard_library_files(1_000_000)]
    train_bpe(texts, _QUICKSTART["vocab_size"]).save(str(place / "tokenizer.json"))
    began = time.perf_counter()
    made = forms(place, given.megabytes, given.files)
    print(f"{given.megabytes} MB of text in {time.perf_counter() - began:.0f} s", flush=True)
    report: dict[str, Any] = {"megabytes": given.megabytes}
    report |= {name: resuming(path, place, given.turns) for name, path in made.items()}
    several = made["files of JSON lines"]
    report["memory_mb"] = memory(several, place, given.batches)
    kinds = {
        "prepared": TextDataModule(None, **_QUICKSTART, cache_dir=str(place / "cache")),
        "stream": module(several, place),
        "stream, one worker": module(several, place, num_workers=1),
    }
    for name, data in kinds.items():
        report[name] = of_a_step(data, given.steps)
        loader, step = report[name].values()
        print(
            f"{name}: the loader takes {loader:.2f} ms a step of {step:.0f} ms, {100 * loader / step:.2f} %", flush=True
        )
    return report


if __name__ == "__main__":
    main()
