"""Speed of the communication options on a network that is really slow.

Two hosts, as network namespaces joined by a veth link that ``tc`` shapes, with two ranks each: tensor inside a host,
expert and data across. One model in all combinations, interleaved in one run, medians over the repeats:

    sudo python benchmarks/slow_network.py --rates 200mbit 1gbit unshaped --json out.json --plot out.png

Needs root (for ``ip netns``) and iproute2. Everything it makes is removed again, after Ctrl-C as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RANKS_PER_HOST, HOSTS, PORT = 2, 2, 29533

# name: (duplicate-token dropping, recomputation, one reduce-scatter, expert_tensor)
COMBINATIONS: dict[str, tuple[bool, str, bool, int]] = {
    "baseline": (False, "full", False, 2),
    "+DTD": (True, "full", False, 2),
    "+CAC": (False, "communication_aware", False, 2),
    "+DTD +CAC": (True, "communication_aware", False, 2),
    "+DTD +CAC +reduce-scatter": (True, "communication_aware", True, 2),
    "folding +CAC": (True, "communication_aware", True, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["200mbit", "1gbit", "unshaped"], help="tc rates, or 'unshaped'")
    parser.add_argument("--steps", type=int, default=2, help="steps timed together")
    parser.add_argument("--repeats", type=int, default=5, help="turns of all combinations")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a step, over all ranks")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--plot", type=Path, help="draw the ratios (needs matplotlib)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        sys.exit("needs root and iproute2 (ip, tc): it builds two network namespaces and shapes the link between them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    result = {rate: measure(rate, options) for rate in options.rates}
    for rate, rows in result.items():
        print(f"\n{rate}")
        for name, row in rows.items():
            sent = ", ".join(f"{axis} {count / 1e6:.1f}" for axis, count in row["sent_bytes_by_axis"].items())
            print(f"  {name:28} {row['step_ms']:7.0f} ms   {row['speedup']:.2f} x   MB sent per rank: {sent}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    if options.plot:
        plot(result, options.plot)
    print(json.dumps(result))


def measure(rate: str, options: argparse.Namespace) -> dict[str, Any]:
    """All combinations at one rate."""
    running: list[subprocess.Popen[bytes]] = []
    with hosts(rate) as names, tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        try:
            for rank in range(HOSTS * RANKS_PER_HOST):
                host = ["ip", "netns", "exec", names[rank // RANKS_PER_HOST]]
                command = [*host, sys.executable, __file__, *sys.argv[1:], "--worker", str(result)]
                running.append(subprocess.Popen(command, env=environment(rank)))
            if any(process.wait() for process in running):
                sys.exit("a rank failed; see above")
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        times = json.loads(result.read_text())
    base = statistics.median(times["baseline"]["step_ms"])
    return {
        name: {
            "step_ms": statistics.median(row["step_ms"]),
            "step_ms_all": row["step_ms"],
            "speedup": base / statistics.median(row["step_ms"]),
            "sent_bytes_by_axis": row["sent_bytes_by_axis"],
        }
        for name, row in times.items()
    }


def environment(rank: int) -> dict[str, str]:
    """What a launcher would set."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(HOSTS * RANKS_PER_HOST),
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "tex0",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def hosts(rate: str) -> Iterator[list[str]]:
    """Two namespaces with a link of that rate between them; gone afterwards."""
    names = [f"tex-{os.getpid()}-{host}" for host in range(HOSTS)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "tex0", "netns", names[0], "type", "veth", "peer", "name", "tex0", "netns", names[1])
        for host, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", "tex0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "tex0", "up")
            if rate != "unshaped":
                shape = [
                    "qdisc",
                    "add",
                    "dev",
                    "tex0",
                    "root",
                    "tbf",
                    "rate",
                    rate,
                    "burst",
                    "256kb",
                    "latency",
                    "400ms",
                ]
                subprocess.run(["tc", "-n", name, *shape], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


# --- one rank


def work(options: argparse.Namespace) -> None:
    """Time every combination, in turns."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    runs = {name: build(*combination, options.sequences) for name, combination in COMBINATIONS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    sent: dict[str, dict[str, float]] = {}
    for name, (step, meter) in runs.items():  # warm up, and count
        with meter.measure():
            step()
        sent[name] = {}
        for kind, count in meter.sent_bytes().items():
            sent[name][kind.axis] = sent[name].get(kind.axis, 0.0) + count
    for _ in range(options.repeats):
        for name, (step, _) in runs.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            dist.barrier()
            times[name].append(1000 * (time.perf_counter() - start) / options.steps)
    if dist.get_rank() == 0:
        rows = {name: {"step_ms": times[name], "sent_bytes_by_axis": sent[name]} for name in runs}
        options.worker.write_text(json.dumps(rows))
    dist.destroy_process_group()


def build(split: bool, mode: str, fused: bool, expert_tensor: int, sequences: int) -> tuple[Any, Any]:
    """A train step of the benchmark's model under one combination, and its byte meter."""
    import torch

    from lightning_tex import placement
    from lightning_tex.layers import VocabParallelCrossEntropy
    from lightning_tex.models import Decoder, DecoderConfig
    from lightning_tex.moe import auxiliary_loss
    from lightning_tex.optim import TiledOptimizer
    from lightning_tex.recompute import recompute
    from lightning_tex.topology import Layout, Topology

    layout = Layout.resolve(4, 2, 2 if expert_tensor == 2 else 4, expert_tensor, [8], split)
    topology = Topology.build(layout, "cpu", split_duplicates=split, fused=fused)
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=4096, dim=256, num_layers=4, num_heads=8, hidden_dim=1024, max_sequence_length=256, num_experts=8,
        top_k=1, capacity_factor=1.25, moe_every=2, activation="gelu",
    )  # fmt: skip
    model, loss = Decoder(config), VocabParallelCrossEntropy()
    placement.cut(model, topology)
    loss.bind(topology)
    recompute(model, mode)  # type: ignore[arg-type]
    parameters = dict(model.named_parameters())
    placed = {parameters[name]: p for name, p in placement.placements(model, topology).items()}
    optimizer = TiledOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), placed, topology.world)
    torch.manual_seed(topology.data.rank)
    ids = torch.randint(0, config.vocab_size, (sequences // topology.data.size, 257))

    def step() -> None:
        optimizer.zero_grad()
        (loss(model(ids[:, :-1]), ids[:, 1:]) + auxiliary_loss(model)).backward()
        optimizer.step()

    return step, topology.world.meter


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed over the baseline's by combination and rate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(result)
    for i, (rate, rows) in enumerate(result.items()):
        axes.bar([x + i * width for x in range(len(rows))], [r["speedup"] for r in rows.values()], width, label=rate)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], list(rows), rotation=20, ha="right")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("speed / baseline's")
    axes.legend(title="link between hosts")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
