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


def broken_slices(
    nodes: Iterable[Mapping[str, Any]], pod_type: str, topology: str, lost_nodes: Collection[str]
) -> set[str]:
    """Names of slices that lack a host, or are about to, and that Ray would reserve, for their first host is there.

    Args:
        nodes: as `ray.nodes()` has them.
        pod_type: of the slices to look at: v4-32.
        topology: that a whole one has: 2x2x4.
        lost_nodes: ids of nodes that will be taken away.
    """
    chips = math.prod(map(int, topology.split("x")))
    alive: dict[str, float] = {}
    reservable: set[str] = set()
    doomed: set[str] = set()
    for node in nodes:
        name = get_tpu_slice_name_from_node(dict(node))
        if name is None or not node["Alive"] or node["Labels"].get(POD_TYPE) != pod_type:
            continue
        alive[name] = alive.get(name, 0) + node["Resources"].get("TPU", 0)
        if node["Labels"].get(WORKER_ID) == "0":
            reservable.add(name)
        if node["NodeID"] in lost_nodes:
            doomed.add(name)
    return {name for name in reservable if alive[name] != chips or name in doomed}


class Fence:
    """Keeps the first hosts of broken slices, so that Ray does not begin to reserve those slices.

    Args:
        pod_type: of the slices that a run asks for: v4-32.
        topology: of a whole one.
        lost_nodes: ids of nodes that will be taken away.
    """

    def __init__(self, pod_type: str, topology: str, lost_nodes: Collection[str]) -> None:
        self._pod_type = pod_type
        self._topology = topology
        self._lost_nodes = lost_nodes
        self._held: dict[str, PlacementGroup] = {}

    def update(self) -> list[str]:
        """Look again; the names of the slices that are fenced off."""
        broken = broken_slices(ray.nodes(), self._pod_type, self._topology, self._lost_nodes)
        for name in broken - set(self._held):
            self._held[name] = placement_group(
                [{f"TPU-{self._pod_type}-head": 1}], bundle_label_selector=[{SLICE_NAME: name, WORKER_ID: "0"}]
            )
        for name in set(self._held) - broken:
            remove_placement_group(self._held.pop(name))
        return sorted(self._held)
