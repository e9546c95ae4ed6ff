"""How fast data is prepared, beside what the tokenizer alone does on one thread.

    python benchmarks/prepare_data.py [--megabytes 100] [--processes 1 2] [--turns 3]

Text of any size is made of the words of this Python's own sources, a document of some hundred to some thousand words.
In turns, so that what else the machine does falls on all alike: ``encode_batch_fast`` of a share of the documents in
one process with one thread, its ids thrown away; and the whole preparation of all of them, from the file that
``datasets`` has made to shards on disk, with each number of processes. Then opening what was prepared, and reading
blocks of it at random. Medians are printed, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_tex.data.corpus import standard_library_files
from lightning_tex.data.documents import TextEncoder, TextRows
from lightning_tex.data.packing import Blocks
from lightning_tex.data.tokenizer import TextTokenizer, train_bpe
from lightning_tex.data.tokens.store import open_shards
from lightning_tex.data.tokens.writing import write_tokens

_SHARE = 10  # megabytes that the tokenizer alone is given


def write_text(file: Path, megabytes: int) -> None:
    """JSON lines of documents of random words."""
    words = " ".join(path.read_text("utf-8", "replace") for path in standard_library_files(2_000_000)).split()
    draw = random.Random(1)
    left = megabytes * 1_000_000
    with file.open("w") as lines:
        while left > 0:
            start = draw.randrange(len(words))
            text = " ".join(words[start : start + draw.randint(100, 4000)])
            left -= lines.write(json.dumps({"text": text}) + "\n")


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def processor_seconds() -> float:
    """Of this process and of those that it has forked and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def alone(tokenizer: TextTokenizer, texts: list[str]) -> None:
    """The tokenizer's own batches of 256."""
    for start in range(0, len(texts), 256):
        tokenizer.tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread in each process
    with tempfile.TemporaryDirectory() as place:
        report = measure(Path(place), given.megabytes, given.processes, given.turns)
    print(json.dumps(report))


def measure(place: Path, megabytes: int, processes: list[int], turns: int) -> dict[str, Any]:
    from datasets import load_dataset

    write_text(place / "text.jsonl", megabytes)
    documents = load_dataset(
        "json", data_files=str(place / "text.jsonl"), split="train", cache_dir=str(place / "arrow")
    )
    share, size = [], 0
    for document in documents:
        share.append(document["text"])
        size += len(share[-1].encode())
        if size > min(_SHARE, megabytes) * 1e6:
            break
    tokenizer = TextTokenizer(train_bpe(share[: len(share) // 4], 32_000))
    rows, encoder = TextRows(documents), TextEncoder(tokenizer)
    times: dict[str, list[float]] = {"alone": [], **{str(count): [] for count in processes}}
    cost: dict[str, list[float]] = {name: [] for name in times}  # seconds of processors a megabyte
    for turn in range(turns):
        before = processor_seconds()
        times["alone"].append(size / 1e6 / seconds(lambda: alone(tokenizer, share)))
        cost["alone"].append((processor_seconds() - before) / size * 1e6)
        for count in processes:
            folder = place / f"tokens-{turn}-{count}"
            before = processor_seconds()
            spent = seconds(lambda: write_tokens(folder, {"train": rows}, encoder, count))  # noqa: B023
            times[str(count)].append(rows.size / 1e6 / spent)
            cost[str(count)].append((processor_seconds() - before) / rows.size * 1e6)
            print(
                f"turn {turn}, {count} processes: {times[str(count)][-1] / times['alone'][-1] / count:.2f}", flush=True
            )
            if (turn, count) != (turns - 1, processes[-1]):
                shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{megabytes} MB, the tokenizer alone on one thread: {medians['alone']:.2f} MB/s")
    for count in processes:
        share_of = [own / alone / count for own, alone in zip(times[str(count)], times["alone"], strict=True)]
        medians[f"{count} of it"] = statistics.median(share_of)
        own_cost = [own / alone for own, alone in zip(cost[str(count)], cost["alone"], strict=True)]
        medians[f"{count} of its processor time"] = statistics.median(own_cost)
        print(
            f"{count} processes: {medians[str(count)]:.2f} MB/s, {statistics.median(share_of):.2f} of {count} x that;"
        )
        print(f"  of processor time they take {statistics.median(own_cost):.2f} of it, whatever else the machine does")
    return {"megabytes": megabytes, **medians, **read(folder / "train")}


def read(folder: Path) -> dict[str, float]:
    """What opening takes, and a block at random."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    stream = open_shards(folder, "")
    blocks = Blocks(stream, 1024, 0, 32_001)
    first = blocks[[0]]
    opened = time.perf_counter() - began
    chosen = np.random.default_rng(0).integers(len(blocks), size=2000).tolist()
    each = seconds(lambda: [blocks[[sample]] for sample in chosen]) / len(chosen)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{len(stream):,} tokens open, and give a block of {first['input_ids'].shape[1]}, in {1e3 * opened:.1f} ms;")
    print(f"a block at random takes {1e6 * each:.0f} us; the process grew by {more:.0f} MB")
    return {"tokens": len(stream), "open_ms": 1e3 * opened, "block_us": 1e6 * each, "grown_mb": more}


if __name__ == "__main__":
    main()
