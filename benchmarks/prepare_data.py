"""How fast data is prepared, beside what the tokenizer alone does on one thread.

    python benchmarks/prepare_data.py [--megabytes 100] [--processes 1 2] [--turns 3]

Text of any size is made of the words of this Python's own sources, a document of some hundred to some thousand words.
In turns, so that what else the machine does falls on all alike: ``encode_batch_fast`` of a share of the documents in
one process with one thread, its ids thrown away; and the whole preparation of all of them by the data module, from the
file of JSON lines to shards on disk, with each number of processes. Then opening what was prepared, and reading batches
of it in an epoch's order. Medians are printed, and one JSON line.
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

from lightning_tex.data import TextDataModule
from lightning_tex.data.corpus import standard_library_files
from lightning_tex.data.packing import Blocks
from lightning_tex.data.tokenizer import TextTokenizer, train_bpe

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


def beginning_of(file: Path, megabytes: int) -> tuple[list[str], int]:
    """Documents of a file, and their bytes."""
    texts, size = [], 0
    with file.open() as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > megabytes * 1e6:
                break
    return texts, size


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
    write_text(place / "text.jsonl", megabytes)
    share, size = beginning_of(place / "text.jsonl", min(_SHARE, megabytes))
    train_bpe(share[: len(share) // 4], 32_000).save(str(place / "tokenizer.json"))
    tokenizer = TextTokenizer.load(place / "tokenizer.json")
    times: dict[str, list[float]] = {"alone": [], **{str(count): [] for count in processes}}
    cost: dict[str, list[float]] = {name: [] for name in times}  # seconds of processors a megabyte

    def take(name: str, action: Callable[[], Any], of_bytes: int) -> None:
        before = processor_seconds()
        times[name].append(of_bytes / 1e6 / seconds(action))
        cost[name].append((processor_seconds() - before) / of_bytes * 1e6)
        print(f"{name}: {times[name][-1]:.2f} MB/s, {cost[name][-1]:.2f} s of processors a MB", flush=True)

    take("alone", lambda: alone(tokenizer, share), size)
    prepared: Any = None
    for turn in range(turns):
        for count in processes:
            data = module(place, place / f"cache-{turn}-{count}", count)
            take(str(count), data.prepare_data, megabytes * 1_000_000)
            take("alone", lambda: alone(tokenizer, share), size)
            if prepared is not None:
                shutil.rmtree(prepared._cache_dir)
            prepared = data
    report: dict[str, Any] = {"megabytes": megabytes, "alone": statistics.median(times["alone"])}
    print(f"{megabytes} MB, the tokenizer alone on one thread: {report['alone']:.2f} MB/s")
    for number, count in enumerate(processes):
        report |= beside_alone(times, cost, count, number, len(processes))
    return {**report, **read(module(place, Path(prepared._cache_dir), None))}


def beside_alone(
    times: dict[str, list[float]], cost: dict[str, list[float]], count: int, number: int, step: int
) -> dict[str, float]:
    """Medians of what so many processes do: MB/s, and beside the tokenizer alone just before and behind them."""
    own, name = times[str(count)], f"{count} processes"
    around = [statistics.mean(times["alone"][turn * step + number :][:2]) for turn in range(len(own))]
    around_cost = [statistics.mean(cost["alone"][turn * step + number :][:2]) for turn in range(len(own))]
    speed = statistics.median(own)
    share = statistics.median(one / other / count for one, other in zip(own, around, strict=True))
    share_of_cost = statistics.median(one / other for one, other in zip(cost[str(count)], around_cost, strict=True))
    print(f"{name}: {speed:.2f} MB/s, {share:.2f} of {count} x the tokenizer alone before and behind it;")
    print(f"  of processor time they take {share_of_cost:.2f} of it, whatever else the machine does")
    return {name: speed, f"{name}, share": share, f"{name}, processor time": share_of_cost}


def module(place: Path, cache: Path, processes: int | None) -> TextDataModule:
    return TextDataModule(
        str(place / "text.jsonl"), tokenizer=str(place / "tokenizer.json"), num_proc=processes, cache_dir=str(cache),
        sequence_length=128, global_batch_size=16,
    )  # fmt: skip


def read(data: TextDataModule) -> dict[str, float]:
    """What it takes to open what was prepared, to begin an epoch of it, and to read a batch in its order."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opening = seconds(data.setup)
    blocks = data.prepared.train
    assert isinstance(blocks, Blocks)
    first = seconds(lambda: blocks[[len(blocks) // 2]])
    batches = iter(data.train_dataloader())
    beginning = seconds(lambda: next(batches))
    each = seconds(lambda: [next(batches) for _ in range(500)]) / 500
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{len(blocks.stream):,} tokens open in {1e3 * opening:.1f} ms, and give a block in {1e3 * first:.1f} ms more; "
        f"an epoch's order of {len(blocks):,} takes {1e3 * beginning:.0f} ms, a batch of 16 x 128 {1e3 * each:.2f} ms; "
        f"the process grew by {more:.0f} MB"
    )
    spent = {"open": opening, "block": first, "epoch": beginning, "batch": each}
    return {"tokens": len(blocks.stream), **{f"{k}_ms": 1e3 * v for k, v in spent.items()}, "grown_mb": more}


if __name__ == "__main__":
    main()
