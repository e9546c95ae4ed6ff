"""Clusters as numbers: memory, arithmetic and links of a GPU and of its node, built in or read from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_tex.parallel.errors import UserValueError

GB, GIB, TERA = 1e9, 2**30, 1e12
Shares = tuple[tuple[Any, float], ...]  # of a mapping; a profile can be hashed
_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
_SHARES = {"narrow_products": None, "link_shares": _OPERATIONS, "network_shares": _OPERATIONS}  # of what


@dataclass(frozen=True)
class Cluster:
    """What a planner has to know of a machine. Links are one-directional, per second.

    Args:
        name: of the hardware.
        gpus_per_node: GPUs (or CPU processes) of a node.
        memory_bytes: of one GPU.
        reserved_bytes: of that, what no tensor can use: the driver's context, communication libraries, fragmentation.
        peak_flops: of products in 16 bits, with fp32 accumulation.
        peak_flops_fp32: of products in fp32.
        product_efficiency: share of the peak that large products reach when measured.
        memory_bandwidth: bytes per second that one GPU reads and writes, as measured by a copy.
        link_bandwidth: bytes per second that one GPU sends to others of its node.
        link_latency: seconds of one message inside a node.
        network_bandwidth: bytes per second that a whole node sends, over all its adapters.
        network_latency: seconds of one message between nodes.
        device: ``cuda`` or ``cpu``.
        narrow_products: smallest size of a product -> share of large ones' speed that it reaches; between them by
            the logarithm.
        attention_efficiency: share of large products' speed that the attention kernel reaches.
        pass_bandwidth: bytes per second of the operations between products, results allocated anew; 0: as a copy.
        link_shares, network_shares: operation -> share of the bandwidth that this collective reaches; others all.
        overlap: share of a collective beside computation that takes no time from it.

    Raises:
        ValueError: a number that is not positive, or a share above 1.
    """

    name: str
    gpus_per_node: int
    memory_bytes: float
    peak_flops: float
    peak_flops_fp32: float
    product_efficiency: float
    memory_bandwidth: float
    link_bandwidth: float
    link_latency: float
    network_bandwidth: float
    network_latency: float
    reserved_bytes: float = 1 * GIB
    device: str = "cuda"
    narrow_products: Shares = ()
    attention_efficiency: float = 1.0
    pass_bandwidth: float = 0.0
    link_shares: Shares = ()
    network_shares: Shares = ()
    overlap: float = 1.0

    def __post_init__(self) -> None:
        for name, keys in _SHARES.items():
            given = getattr(self, name)
            object.__setattr__(self, name, _shares(f"cluster {self.name!r}: {name}", given, keys))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "device", *_SHARES):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserValueError(f"cluster {self.name!r}: {field.name}={value!r} must be a number")
            if value < 0 or (value == 0 and field.name not in _MAY_BE_0):
                raise UserValueError(f"cluster {self.name!r}: {field.name}={value} must be positive")
            if value > 1 and field.name in ("product_efficiency", "attention_efficiency", "overlap"):
                raise UserValueError(f"cluster {self.name!r}: {field.name}={value} must be at most 1")
        if self.gpus_per_node != int(self.gpus_per_node):
            raise UserValueError(f"cluster {self.name!r}: gpus_per_node={self.gpus_per_node} must be a whole number")
        if self.device not in ("cuda", "cpu"):
            raise UserValueError(f"cluster {self.name!r}: device={self.device!r}; legal: 'cuda', 'cpu'")

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU that tensors can use."""
        return self.memory_bytes - self.reserved_bytes

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of products in a Trainer's precision."""
        return self.peak_flops_fp32 if precision in ("32-true", "64-true") else self.peak_flops

    def product_flops(self, precision: str, smallest: float) -> float:
        """FLOP/s that a product reaches whose smallest size is that."""
        return self.peak(precision) * self.product_efficiency * _between(self.narrow_products, smallest)

    def attention_flops(self, precision: str) -> float:
        """FLOP/s that the attention kernel reaches."""
        return self.peak(precision) * self.product_efficiency * self.attention_efficiency

    def passes(self, moved: float) -> float:
        """Seconds in which the operations between products read and write so many bytes."""
        return moved / (self.pass_bandwidth or self.memory_bandwidth)

    def link(self, operation: str) -> float:
        """Bytes per second that a GPU sends to others of its node in a collective."""
        return self.link_bandwidth * dict(self.link_shares).get(operation, 1.0)

    def network(self, operation: str) -> float:
        """Bytes per second that a node sends in a collective."""
        return self.network_bandwidth * dict(self.network_shares).get(operation, 1.0)

    @classmethod
    def named(cls, name: str) -> Cluster:
        """A built-in profile by name, or the one that a YAML file holds.

        Raises:
            ValueError: no such profile or file, or a file with other fields than :class:`Cluster` has.
        """
        if name in CLUSTERS:
            return CLUSTERS[name]
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            raise UserValueError(f"cluster {name!r} is not known; legal: {', '.join(CLUSTERS)}, or a .yaml file")
        if not path.is_file():
            raise UserValueError(f"cluster file {name} does not exist; built-in clusters: {', '.join(CLUSTERS)}")
        try:
            given = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserValueError(f"cluster file {name} is not YAML: {' '.join(str(error).split())}") from None
        return cls.from_fields(given, name)

    @classmethod
    def of_device(cls, device: torch.device) -> Cluster | None:
        """The built-in profile of a CUDA device; ``None`` where there is none of its kind."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return CLUSTERS.get(_profile_of(found.name, found.total_memory) or "")

    @classmethod
    def from_fields(cls, given: Any, source: str) -> Cluster:
        """A cluster from a mapping of its fields.

        Raises:
            ValueError: naming fields that are missing or unknown.
        """
        required = {f.name for f in fields(cls) if f.default is MISSING}
        if not isinstance(given, Mapping):
            raise UserValueError(f"cluster file {source} must be a mapping of {', '.join(sorted(required))}")
        missing, unknown = required - set(given), set(given) - {f.name for f in fields(cls)}
        if missing or unknown:
            said = [f"{what}: {', '.join(sorted(map(str, names)))}" for what, names in
                    (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
            raise UserValueError(f"cluster file {source}: {'; '.join(said)}")
        numbers = {key: _number(value) for key, value in given.items()}
        return cls(**{**numbers, "name": str(given["name"])})

    def write(self, path: Path) -> None:
        """Write the YAML that :meth:`named` reads."""
        path.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False))

    def as_dict(self) -> dict[str, Any]:
        """The fields, as a file holds them."""
        return {**asdict(self), **{name: dict(getattr(self, name)) for name in _SHARES}}

    def with_gpus_per_node(self, gpus: int) -> Cluster:
        """The same nodes, of which each lends that many GPUs."""
        return replace(self, name=f"{self.name}, {gpus} of {self.gpus_per_node} GPUs a node", gpus_per_node=gpus)


_MAY_BE_0 = ("reserved_bytes", "link_latency", "network_latency", "pass_bandwidth", "overlap")


def _shares(what: str, given: Any, keys: Sequence[str] | None) -> Shares:
    try:  # JSON has no numbers as keys
        named = {str(key) if keys else int(key): float(share) for key, share in dict(given).items()}
    except (TypeError, ValueError):
        example = "{all_to_all: 0.8}" if keys else "{256: 0.8}"
        raise UserValueError(f"{what}={given!r} must map to shares, such as {example}") from None
    if unknown := [key for key in named if (key not in keys if keys else int(key) < 1)]:
        raise UserValueError(
            f"{what}: {unknown[0]!r} is unknown; legal: {', '.join(keys) if keys else 'sizes of 1 or more'}"
        )
    if wrong := [share for share in named.values() if not 0 < share <= 1]:
        raise UserValueError(f"{what}: {wrong[0]} must be above 0 and at most 1")
    return tuple(sorted(named.items()))


def _between(shares: Shares, size: float) -> float:
    """The share at that size, by its logarithm; beyond the largest size, 1 at twice that."""
    if not shares:
        return 1.0
    points = [(log2(at), share) for at, share in shares] + [(log2(shares[-1][0]) + 1, 1.0)]
    x = log2(max(1.0, size))
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return 1.0


def _profile_of(device: str, memory: int) -> str | None:
    """Name of the profile for a device as its driver names it; H100 and H200 on PCIe cards are slower than those."""
    if any(slower in device for slower in ("PCIe", "NVL", "MIG")) and "A100" not in device:
        return None
    large = memory > 60 * GB
    for kind, profile in (("H200", "h200"), ("H100", "h100"), ("A100", "a100-80gb" if large else "a100-40gb"),
                          ("V100-SXM2-32GB", "dgx1-v100-32gb"), ("V100-SXM2", "summit-v100-16gb")):  # fmt: skip
        if kind in device:
            return profile
    return None


def _number(value: Any) -> Any:
    try:  # YAML 1.1 reads 1e9 as a word
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Latencies are of one message of a ring as a collective sees it. No maker publishes them: 5 us inside a node and 10 us
# outside are assumptions, to be replaced by what ``lightning-tex bench calibrate`` measures. Efficiency of V100
# products: 83 of 112.5 TFLOP/s with cuBLAS (Markidis et al., "NVIDIA Tensor Core Programmability, Performance &
# Precision", IPDPSW 2018), of its memory 750 of 900 GB/s (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture
# via Microbenchmarking", 2018). Those of A100, H100 and H200 are assumptions: 0.8 of an A100's peak, 0.7 of an H100's,
# whose power limit keeps large products below the rated clock.
_V100: dict[str, Any] = {
    # NVIDIA V100 data sheet (SXM2): 125 TFLOP/s tensor, 15.7 fp32, 900 GB/s.
    "peak_flops": 125 * TERA,
    "peak_flops_fp32": 15.7 * TERA,
    "product_efficiency": 0.74,
    "memory_bandwidth": 750 * GB,
    "link_latency": 5e-6,
    "network_latency": 10e-6,
}
_A100: dict[str, Any] = {
    # NVIDIA A100 data sheet (SXM4): 312 TFLOP/s bf16, 19.5 fp32, NVLink 600 GB/s in both directions together.
    "gpus_per_node": 8,
    "peak_flops": 312 * TERA,
    "peak_flops_fp32": 19.5 * TERA,
    "product_efficiency": 0.8,
    "link_bandwidth": 300 * GB,
    "link_latency": 5e-6,
    "network_bandwidth": 8 * 25 * GB,  # DGX A100 user guide: 8 x HDR 200 Gbit/s for the compute fabric
    "network_latency": 10e-6,
}
_H100: dict[str, Any] = {
    # NVIDIA H100 and H200 data sheets (SXM): 989 TFLOP/s bf16 dense, 67 fp32, NVLink 900 GB/s in both directions.
    "gpus_per_node": 8,
    "peak_flops": 989 * TERA,
    "peak_flops_fp32": 67 * TERA,
    "product_efficiency": 0.7,
    "link_bandwidth": 450 * GB,
    "link_latency": 5e-6,
    "network_bandwidth": 8 * 50 * GB,  # DGX H100 user guide: 8 x NDR 400 Gbit/s for the compute fabric
    "network_latency": 10e-6,
}
CLUSTERS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        Cluster(
            # OLCF Summit user guide: six V100 a node, two NVLink bricks (50 GB/s each way) between GPUs of a socket,
            # dual-rail EDR InfiniBand, 2 x 12.5 GB/s.
            name="summit-v100-16gb",
            gpus_per_node=6,
            memory_bytes=16 * GIB,
            link_bandwidth=50 * GB,
            network_bandwidth=2 * 12.5 * GB,
            **_V100,
        ),
        Cluster(
            # NVIDIA DGX-1 (V100) user guide: eight V100 of 32 GB, six NVLinks of 25 GB/s each way a GPU in a hybrid
            # cube mesh, 4 x EDR InfiniBand.
            name="dgx1-v100-32gb",
            gpus_per_node=8,
            memory_bytes=32 * GIB,
            link_bandwidth=150 * GB,
            network_bandwidth=4 * 12.5 * GB,
            **_V100,
        ),
        # Memory of a copy: 0.85 of the data sheet's 1555, 2039, 3350 and 4800 GB/s.
        Cluster(name="a100-40gb", memory_bytes=40 * GIB, memory_bandwidth=0.85 * 1555 * GB, **_A100),
        Cluster(name="a100-80gb", memory_bytes=80 * GIB, memory_bandwidth=0.85 * 2039 * GB, **_A100),
        Cluster(name="h100", memory_bytes=80 * GIB, memory_bandwidth=0.85 * 3350 * GB, **_H100),
        Cluster(name="h200", memory_bytes=141 * GB, memory_bandwidth=0.85 * 4800 * GB, **_H100),
    )
}
