"""Which TPU slices of a Ray cluster are whole: Ray reserves one by its first host, be the others there or not."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.tpu import get_tpu_slice_name_from_node

POD_TYPE = "ray.io/tpu-pod-type"
WORKER_ID = "ray.io/tpu-worker-id"
SLICE_NAME = "ray.io/tpu-slice-name"


def broken_slices(nodes: Iterable[Mapping[str, Any]], topology: str, lost_nodes: Collection[str]) -> dict[str, str]:
    """Slices that lack a host, or are about to.

    Args:
        nodes: as `ray.nodes()` has them.
        topology: that a whole one has: 2x2x4.
        lost_nodes: ids of nodes that will be taken away.

    Returns:
        The pod type (v4-32) of each, by its name.
    """
    chips = math.prod(map(int, topology.split("x")))
    alive: dict[str, float] = {}
    kinds: dict[str, str] = {}
    doomed: set[str] = set()
    for node in nodes:
        name = get_tpu_slice_name_from_node(dict(node))
        if name is None:
            continue
        if node["Alive"]:
            alive[name] = alive.get(name, 0) + node["Resources"].get("TPU", 0)
            kinds[name] = node["Labels"].get(POD_TYPE, "")
            if node["NodeID"] in lost_nodes:
                doomed.add(name)
    return {name: kinds[name] for name, count in alive.items() if count != chips or name in doomed}


class Fence:
    """Keeps the first hosts of broken slices, so that Ray does not begin to reserve those slices.

    Args:
        topology: of a whole slice.
        lost_nodes: ids of nodes that will be taken away.
    """

    def __init__(self, topology: str, lost_nodes: Collection[str]) -> None:
        self._topology = topology
        self._lost_nodes = lost_nodes
        self._held: dict[str, PlacementGroup] = {}

    def update(self) -> list[str]:
        """Look again; the names of the slices that are fenced off."""
        broken = broken_slices(ray.nodes(), self._topology, self._lost_nodes)
        for name, kind in broken.items():
            if name not in self._held:
                self._held[name] = placement_group(
                    [{f"TPU-{kind}-head": 1}], bundle_label_selector=[{SLICE_NAME: name, WORKER_ID: "0"}]
                )
        for name in set(self._held) - set(broken):
            remove_placement_group(self._held.pop(name))
        return sorted(self._held)
