"""`python -m sophia_levanter.cluster.ray.driver ORDER`: run one attempt on a Ray cluster with Ray Train.

The output of the processes is printed, with each line prefixed by the process number. The exit status is 0 if the run
is done, 1 on failure, 2 on bad input, 69 if nodes are missing, and 75 if the run saved and exited after a stop request
or a preemption.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2.jax import JaxConfig, JaxTrainer
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.tpu import get_tpu_slice_name_from_node

from sophia_levanter.cluster.backend import Unavailable
from sophia_levanter.cluster.config import RayCluster
from sophia_levanter.cluster.ray.worker import Board, run_host
from sophia_levanter.errors import InputError
from sophia_levanter.planning.target import GENERATIONS, TpuShape
from sophia_levanter.status import BAD_INPUT, DONE, FAILURE, PREEMPTED, UNAVAILABLE, report_failure

POLL_SECONDS = 0.5
FENCE_SECONDS = 5.0
POD_TYPE = "ray.io/tpu-pod-type"
WORKER_ID = "ray.io/tpu-worker-id"
SLICE_NAME = "ray.io/tpu-slice-name"


def main(order_file: Path) -> int:
    """Run the attempt described in `RayBackend`'s order file.

    Returns:
        The exit status.
    """
    order = json.loads(order_file.read_text())
    cluster = RayCluster(**order["cluster"])
    # With these variables, Ray Train's controller checks every second whether nodes will be preempted.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    try:
        ray.init(
            address=cluster.address,
            include_dashboard=False if cluster.address == "local" else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        # Once the run has begun, the cluster's head may come back.
        status = UNAVAILABLE if order["has_begun"] else BAD_INPUT
        return _reported(f"address {cluster.address}: {str(error).splitlines()[0]}", status)
    # Replace Ray's own handler, which ends the process immediately.
    signal.signal(signal.SIGTERM, note)
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    board = ray.remote(num_cpus=0, resources=here)(Board).remote(cluster.num_processes)
    fit = _Fit(_trainer(cluster, order, board))
    fence = Fence(cluster.shape, order["lost_nodes"]) if cluster.shape else None
    if fence is not None and (fenced := fence.update()):
        print(f"excluded slices that lack a host or are about to lose one: {', '.join(fenced)}", flush=True)
    fit.start()
    try:
        seen = _follow(fit, board, fence, cluster, told)
    except Unavailable as error:
        return _reported(str(error), UNAVAILABLE)
    return exit_status(fit.error, seen, cluster.num_processes, Path(order["lost_file"]))


def ray_accelerator(generation: str) -> str:
    """Return Ray's name for a TPU generation, such as TPU-V5LITEPOD for v5e."""
    return f"TPU-{GENERATIONS[generation].type_prefix.upper()}"


def broken_slices(nodes: Iterable[Mapping[str, Any]], shape: TpuShape, lost_nodes: Collection[str]) -> set[str]:
    """Return the names of slices that lack a host or will lose one, but that Ray would still reserve.

    Args:
        nodes: the nodes, as returned by `ray.nodes()`.
        shape: the shape of the slices to consider.
        lost_nodes: ids of nodes that will be preempted.
    """
    alive: dict[str, float] = {}
    reservable: set[str] = set()
    doomed: set[str] = set()
    for node in nodes:
        name = get_tpu_slice_name_from_node(dict(node))
        if name is None or not node["Alive"] or node["Labels"].get(POD_TYPE) != shape.accelerator_type:
            continue
        alive[name] = alive.get(name, 0) + node["Resources"].get("TPU", 0)
        if node["Labels"].get(WORKER_ID) == "0":
            reservable.add(name)
        if node["NodeID"] in lost_nodes:
            doomed.add(name)
    return {name for name in reservable if alive[name] != shape.chips or name in doomed}


class Fence:
    """Reserves the first hosts of broken slices, so that Ray does not use those slices.

    Ray Train reserves a slice through its first host, whether or not the other hosts are alive, and has no setting to
    select or exclude slices. (`ray.util.tpu` counts complete slices but does not know which of them will be preempted.)

    Args:
        shape: the shape of the run's slices.
        lost_nodes: ids of nodes that will be preempted.
    """

    def __init__(self, shape: TpuShape, lost_nodes: Collection[str]) -> None:
        self._shape = shape
        self._lost_nodes = lost_nodes
        self._held: dict[str, PlacementGroup] = {}

    def update(self) -> list[str]:
        """Update the reservations and return the names of the excluded slices."""
        broken = broken_slices(ray.nodes(), self._shape, self._lost_nodes)
        for name in broken - set(self._held):
            self._held[name] = placement_group(
                [{f"TPU-{self._shape.accelerator_type}-head": 1}],
                bundle_label_selector=[{SLICE_NAME: name, WORKER_ID: "0"}],
            )
        for name in set(self._held) - broken:
            remove_placement_group(self._held.pop(name))
        return sorted(self._held)


class _Fit(threading.Thread):
    """Runs `trainer.fit()` while the main thread monitors the attempt."""

    def __init__(self, trainer: JaxTrainer) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error


def _trainer(cluster: RayCluster, order: dict[str, Any], board: Any) -> JaxTrainer:
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    accelerator: dict[str, Any] = {}
    if cluster.shape is not None:
        accelerator = {
            "use_tpu": True,
            "topology": cluster.shape.topology,
            "accelerator_type": ray_accelerator(cluster.shape.generation),
        }
        resources = {}
    # Pass secrets through the object store, which only the workers read, because Ray stores and shows configurations.
    secrets = ray.put({name: os.environ[name] for name in cluster.secrets})
    return JaxTrainer(
        run_host,
        train_loop_config={
            "config": order["config"],
            "env": dict(cluster.env),
            "secrets": [secrets],
            "board": board,
            "slices": cluster.slices,
        },
        # The worker itself does not use jax, because the devices belong to its training process.
        jax_config=JaxConfig(use_tpu=False, use_gpu=False),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_processes,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources or None,
            placement_strategy="SPREAD",
            **accelerator,
        ),
        # Ray's own retries are disabled. As with every backend, the launcher decides whether to retry. Unlike Ray, it
        # counts failures at the same step, and it survives failures of Ray's head node, which end this driver.
        run_config=RunConfig(
            storage_path=order["storage"],
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, preemption_grace_s=cluster.stop_timeout
            ),
        ),
    )


def _follow(fit: _Fit, board: Any, fence: Fence | None, cluster: RayCluster, told: list[int]) -> dict[str, Any]:
    """Print lines until the attempt is over, and return the final state of the board.

    Raises:
        Unavailable: if no worker starts within `start_timeout`.
    """
    began = fenced = time.monotonic()
    first_ended: float | None = None
    seen: dict[str, Any] = {"statuses": {}, "lost_nodes": [], "hosts": 0}
    while True:
        over = not fit.is_alive()
        seen = ray.get(board.take.remote())
        for rank, line in seen["lines"]:
            print(f"{rank}: {line}", flush=True)
        if over:
            return seen
        if told:
            told.clear()
            if not seen["hosts"]:
                return seen
            ray.get(board.stop.remote())
        now = time.monotonic()
        if not seen["hosts"] and now > began + cluster.start_timeout:
            raise Unavailable(
                f"no nodes were found for the run's workers within {cluster.start_timeout} s (start_timeout)"
            )
        if fence is not None and now > fenced + FENCE_SECONDS:
            fence.update()
            fenced = now
        first_ended = first_ended or (now if seen["statuses"] else None)
        if first_ended is not None and now > first_ended + cluster.stop_timeout:
            print(
                f"one process exited, but others did not exit within {cluster.stop_timeout} s (stop_timeout)",
                flush=True,
            )
            return seen
        fit.join(timeout=POLL_SECONDS)


def _reported(message: str, status: int) -> int:
    print(f"error: {message}", flush=True)
    report_failure(InputError.reason if status == BAD_INPUT else "unavailable", message)
    return status


def exit_status(error: Exception | None, seen: dict[str, Any], num_processes: int, lost_file: Path) -> int:
    """Determine the driver's exit status from the final state of the board, and write the lost nodes to a file.

    Args:
        error: the exception raised by `fit`, if any.
        seen: the final state of the board. `statuses` must be in the order in which the processes ended.
        num_processes: number of processes in the run.
        lost_file: the file for the lost nodes, which the launcher reads.
    """
    statuses = list(seen["statuses"].values())
    lost = set(seen["lost_nodes"])
    if isinstance(error, PreemptionError):
        lost |= set(error.preemption_info.preempted_node_ids)
    if isinstance(error, WorkerGroupError):
        lost |= {"unknown" for failure in error.worker_failures.values() if _was_preempted(failure)}
    all_well = len(statuses) == num_processes and set(statuses) <= {DONE, PREEMPTED}
    status = max(statuses) if all_well else FAILURE
    if lost or (status == FAILURE and statuses[:1] == [PREEMPTED]):
        lost_file.write_text(json.dumps(sorted(lost)))
    if status != FAILURE:
        return status
    if statuses and all(status == BAD_INPUT for status in statuses):
        return BAD_INPUT
    if isinstance(error, TrainingFailedError) and not statuses:
        print(f"Ray: {' '.join(str(error).split())[-500:]}", flush=True)
    for rank, status in sorted(seen["statuses"].items()):
        if status not in (DONE, PREEMPTED):
            print(f"process {rank} exited with status {status}", flush=True)
    return FAILURE


def _was_preempted(failure: Any) -> bool:
    """Return whether Ray reports that the node of a failed worker was preempted."""
    return bool(getattr(getattr(failure, "health_check_failure", failure), "preempted", False))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
