"""Time of a collective on its axis: alpha-beta, by where the axis's ranks stand on nodes."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log2
from typing import NamedTuple

import numpy as np

from lightning_tex.parallel.layout import Layout
from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.collective import Collective


class Span(NamedTuple):
    """How the groups of an axis lie on nodes. Ranks are numbered node by node.

    Args:
        inside: every group stands on one node.
        rings: the most groups whose rings leave one node: they share its network.
        remote: of the busiest node, the sum over its ranks of the share of a rank's peers that stand elsewhere.
        local: the largest share of a rank's peers that stand on its node.
    """

    inside: bool
    rings: int
    remote: float
    local: float


@lru_cache(maxsize=65536)
def span(layout: Layout, axis: str, gpus_per_node: int) -> Span:
    """How the groups of an axis lie on nodes of that many ranks."""
    ranks = np.arange(layout.world)
    node = ranks // gpus_per_node
    group = layout.group_number(axis, ranks)
    size = layout.axis_size(axis)
    nodes = int(node[-1]) + 1
    # Members of one group on one node, and at each rank their number.
    places, at, members = np.unique(group * nodes + node, return_inverse=True, return_counts=True)
    on_node = members[at]
    inside = bool((on_node == size).all())
    leaving = np.bincount(places[members < size] % nodes, minlength=nodes)
    remote = np.bincount(node, weights=(size - on_node) / max(1, size - 1), minlength=nodes)
    local = float((on_node - 1).max() / max(1, size - 1))
    return Span(inside, int(leaving.max()), float(remote.max()), local)


def seconds(collective: Collective, layout: Layout, cluster: Cluster) -> float:
    """Time of one collective of that kind.

    Rings: every rank sends its bytes to the next; on a node that a ring leaves, the rings of all its groups share the
    network. An all-reduce takes the better of ring and tree. An all-to-all sends to all peers at once: inside the node
    over links, outside over the network that all ranks of the node share; so does a reduce-scatter on CPU, where the
    parts are sent and summed (gloo has none).
    """
    size = collective.size
    if size == 1:
        return 0.0
    where = span(layout, collective.axis, cluster.gpus_per_node)
    sent = (2 if collective.operation == "all_reduce" else 1) * (size - 1) / size * collective.whole_bytes
    latency = cluster.link_latency if where.inside else cluster.network_latency
    operation = collective.operation
    link, network = cluster.link(operation), cluster.network(operation)
    if operation == "all_to_all" or (operation == "reduce_scatter" and cluster.device == "cpu"):
        local, remote = where.local * sent / link, where.remote * sent / network
        return max(local, remote) + ceil(log2(size)) * latency
    per_byte = 1 / link
    if not where.inside:
        per_byte = max(per_byte, where.rings / network)
    if operation == "broadcast":
        return collective.whole_bytes * per_byte + ceil(log2(size)) * latency
    if operation == "all_reduce":
        ring = sent * per_byte + 2 * (size - 1) * latency
        tree = 2 * collective.whole_bytes * per_byte + 2 * ceil(log2(size)) * latency
        return min(ring, tree)
    return sent * per_byte + (size - 1) * latency
