"""Saving and loading a checkpoint directory beside torch.save and torch.distributed.checkpoint, the same bytes.

    python benchmarks/checkpoint.py --megabytes 200 --ranks 2 --turns 5 [--device cuda]

In turns, medians over them, of rank 0's wall time: the copy of the states alone; how long a save in the background
holds training up; a save until it is on disk for good; ``torch.save`` of each rank's part; ``dcp.save``; and loading by
each. Ours brings files to disk (fsync) and reads them back, the others do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import Background, SideGroup
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.writing import begin


def broadcast(value: Any) -> Any:
    """Rank 0's object."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def measured(
    rank: int, ranks: int, port: int, megabytes: int, turns: int, folder: str, device: str, results: Any
) -> None:
    """One rank's part: tensors of 8 MB, cut in dim 0."""
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh, world = init_device_mesh(device, (ranks,)), Axis("world", ranks, rank, tuple(range(ranks)), dist.group.WORLD)
    group, background = SideGroup(world, timedelta(minutes=10)), Background()
    count, rows = max(1, megabytes // 8), 2048 // ranks
    parts = {f"t{i}": torch.rand(rows, 1024, device=device) for i in range(count)}
    whole = (rows * ranks, 1024)
    ours = {n: GlobalTensor(whole, t.dtype, [Part.of((rank * rows, 0), t)]) for n, t in parts.items()}
    theirs = {n: DTensor.from_local(t, mesh, [Shard(0)]) for n, t in parts.items()}
    times: dict[str, list[float]] = {}

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def timed(name: str, act: Callable[[], Any]) -> Any:
        wait()
        began = time.perf_counter()
        result = act()
        wait()
        times.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for turn in range(turns):
        place = Path(folder, str(turn))
        timed("copy of the states", lambda: [t.to("cpu", copy=True) for t in parts.values()])
        trainer_state: dict[str, Any] = {"global_step": turn}
        layout = Layout(ranks)

        def start(path: Path) -> Any:
            return begin(path, False, {"model": ours}, trainer_state, layout, world, broadcast)  # noqa: B023

        def blocked(path: Path) -> None:
            save = start(path)
            background.submit(lambda: save.finish(group))

        timed("save: training held up", lambda: blocked(place / "background"))  # noqa: B023
        timed("save: the rest beside training", background.wait)
        timed("save", lambda: start(place / "ours").finish(group))  # noqa: B023
        timed("torch.save", lambda: torch.save(parts, place / f"{rank}.pt"))  # noqa: B023
        timed("dcp.save", lambda: dcp.save(theirs, checkpoint_id=place / "dcp"))  # noqa: B023
        source = timed("load: verify", lambda: Directory.verified(place / "ours", world))  # noqa: B023
        timed("load: read", lambda: source.fill({("model", n): t for n, t in ours.items()}))  # noqa: B023
        timed("torch.load", lambda: torch.load(place / f"{rank}.pt"))  # noqa: B023
        timed("dcp.load", lambda: dcp.load(theirs, checkpoint_id=place / "dcp"))  # noqa: B023
        if rank == 0:
            shutil.rmtree(place)
    background.close()
    if rank == 0:
        results.put({name: statistics.median(values) for name, values in times.items()})
    dist.destroy_process_group()


def main() -> None:
    """Run the ranks and print a table, and with ``--json`` one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of all ranks together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the states are")
    parser.add_argument("--port", type=int, default=29611)
    parser.add_argument("--folder", help="on the file system to measure (default: that of temporary files)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = (options.ranks, options.port, options.megabytes, options.turns, folder, options.device, results)
        mp.spawn(measured, arguments, nprocs=options.ranks)
        found = results.get()
    megabytes = max(1, options.megabytes // 8) * 8
    for name, seconds in found.items():
        print(f"{name:32s} {seconds * 1e3:9.1f} ms {megabytes / seconds:9.0f} MB/s")
    if options.json:
        said = {"megabytes": megabytes, "ranks": options.ranks, "device": options.device}
        print(json.dumps({**said, "seconds": found}))


if __name__ == "__main__":
    main()
