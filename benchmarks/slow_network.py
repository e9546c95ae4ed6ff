"""Speed of the communication options on a network that is really slow.

Two hosts, as network namespaces joined by a veth link that ``tc`` shapes, with two ranks each: tensor inside a host,
expert and data across. On them ``lightning-tex bench communication`` runs one recipe in all combinations, interleaved,
and gives medians over its turns:

    sudo python benchmarks/slow_network.py --rates 200mbit 1gbit unshaped --json out.json --plot out.png

Needs root (for ``ip netns``) and iproute2. Everything it makes is removed again, after Ctrl-C as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RANKS_PER_HOST, HOSTS, PORT = 2, 2, 29533
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["200mbit", "1gbit", "unshaped"], help="tc rates, or 'unshaped'")
    parser.add_argument("--config", type=Path, default=HERE / "slow_network.yaml", help="the recipe")
    parser.add_argument("--steps", type=int, default=2, help="steps timed together")
    parser.add_argument("--turns", type=int, default=5, help="turns of all combinations")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--plot", type=Path, help="draw the ratios (needs matplotlib)")
    options, more = parser.parse_known_args()
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        sys.exit("needs root and iproute2 (ip, tc): it builds two network namespaces and shapes the link between them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    result = {}
    for rate in options.rates:
        print(f"--- {rate}", flush=True)
        result[rate] = measure(rate, options, more)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2))
    if options.plot:
        plot(result, options.plot)
    print(json.dumps(result))


def measure(rate: str, options: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """The report of ``lightning-tex bench communication`` at one rate."""
    bench = ["-m", "lightning_tex", "bench", "communication", "--json", "--config", str(options.config)]
    bench += ["--steps", str(options.steps), "--turns", str(options.turns), *more]
    bench += ["--trainer.devices", str(RANKS_PER_HOST), "--trainer.num_nodes", str(HOSTS)]
    with hosts(rate) as names:
        return run(names, bench)


def run(names: list[str], arguments: list[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python on every rank of the hosts, tell what rank 0 prints, and return the object of its last line."""
    running: list[subprocess.Popen[str]] = []
    try:
        for rank in range(HOSTS * RANKS_PER_HOST):
            command = ["ip", "netns", "exec", names[rank // RANKS_PER_HOST], sys.executable, *arguments]
            output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            variables = {**launched(rank), **(environment or {})}
            running.append(subprocess.Popen(command, env=variables, stdout=output, text=True))
        assert running[0].stdout is not None
        lines = []
        for line in running[0].stdout:
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", flush=True)
        if any(process.wait() for process in running):
            sys.exit("a rank failed; see above")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return json.loads(lines[-1])


def launched(rank: int) -> dict[str, str]:
    """What a launcher would set."""
    return {
        **os.environ,
        "RANK": str(rank),
        "NODE_RANK": str(rank // RANKS_PER_HOST),
        "LOCAL_RANK": str(rank % RANKS_PER_HOST),
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "tex0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
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


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed over the baseline's by combination and rate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(result)
    for i, (rate, report) in enumerate(result.items()):
        rows = report["combinations"]
        axes.bar([x + i * width for x in range(len(rows))], [r["speedup"] for r in rows.values()], width, label=rate)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], list(rows), rotation=20, ha="right")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("speed / baseline's")
    axes.legend(title="link between hosts")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
