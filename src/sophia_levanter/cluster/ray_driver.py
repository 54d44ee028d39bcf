"""`python -m sophia_levanter.cluster.ray_driver ORDER`: one attempt of a run on a Ray cluster, through Ray Train.

Prints what the processes print, each line with the number of its process before it. Exit status: 0 done, 1 failure,
2 bad input, 75 stopped or preempted, and saved.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2.jax import JaxConfig, JaxTrainer

from sophia_levanter.cluster.ray_host import Board, run_host
from sophia_levanter.cluster.ray_slices import Fence
from sophia_levanter.cluster.tpu_shapes import GENERATIONS
from sophia_levanter.errors import InputError
from sophia_levanter.exit_status import BAD_INPUT, DONE, FAILURE, PREEMPTED
from sophia_levanter.status import report_failure

POLL_SECONDS = 0.5
FENCE_SECONDS = 5.0


def main(order_file: Path) -> int:
    """Do what the order says.

    Returns:
        The exit status.
    """
    order = json.loads(order_file.read_text())
    cluster = order["cluster"]
    # Ray Train reads these in its controller, and asks each second whether nodes are to be taken away.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    try:
        ray.init(
            address=cluster["address"],
            include_dashboard=False if cluster["address"] == "local" else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        message = f"address {cluster['address']}: {str(error).splitlines()[0]}"
        print(f"error: {message}", flush=True)
        report_failure(InputError.reason, message)
        return BAD_INPUT
    # Ray puts in its own, which ends at once.
    signal.signal(signal.SIGTERM, note)
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    board = ray.remote(num_cpus=0, resources=here)(Board).remote(cluster["workers"])
    fit = _Fit(_trainer(order, board))
    fence = Fence(cluster["pod_type"], cluster["topology"], order["lost_nodes"]) if cluster["topology"] else None
    if fence is not None and (fenced := fence.update()):
        print(f"not used, for they lack a host or are about to: {', '.join(fenced)}", flush=True)
    fit.start()
    seen = _follow(fit, board, fence, cluster["start_timeout"], cluster["stop_timeout"], told)
    return exit_status(fit.error, seen, order)


def ray_accelerator(generation: str) -> str:
    """Ray's name of a generation of TPUs: TPU-V5LITEPOD for v5e."""
    return f"TPU-{GENERATIONS[generation].type_prefix.upper()}"


class _Fit(threading.Thread):
    """`trainer.fit()` while this process goes on to listen."""

    def __init__(self, trainer: JaxTrainer) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error


def _trainer(order: dict[str, Any], board: Any) -> JaxTrainer:
    cluster = order["cluster"]
    resources: dict[str, float] = {"CPU": cluster["cpus_per_worker"]}
    if cluster["gpus_per_worker"]:
        resources["GPU"] = cluster["gpus_per_worker"]
    accelerator: dict[str, Any] = {}
    if cluster["topology"]:
        accelerator = {
            "use_tpu": True,
            "topology": cluster["topology"],
            "accelerator_type": ray_accelerator(cluster["generation"]),
        }
        resources = {}
    # In the object store, whence only the workers take it: not in what Ray keeps of a run, or shows.
    secrets = ray.put({name: os.environ[name] for name in order["secrets"]})
    return JaxTrainer(
        run_host,
        train_loop_config={
            "config": order["config"],
            "env": order["env"],
            "secrets": [secrets],
            "board": board,
            "slices": cluster["slices"],
        },
        # The worker itself stays clear of jax and its devices: they are its process's.
        jax_config=JaxConfig(use_tpu=False, use_gpu=False),
        scaling_config=ScalingConfig(
            num_workers=cluster["workers"],
            use_gpu=bool(cluster["gpus_per_worker"]),
            resources_per_worker=resources or None,
            placement_strategy="SPREAD",
            **accelerator,
        ),
        # Whether there is to be another attempt is the launcher's to say, as on every backend.
        run_config=RunConfig(
            storage_path=order["storage"],
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, preemption_grace_s=cluster["stop_timeout"]
            ),
        ),
    )


def _follow(
    fit: _Fit, board: Any, fence: Fence | None, start_timeout: float, stop_timeout: float, told: list[int]
) -> dict[str, Any]:
    """Prints lines until the attempt is over; what the board had at last."""
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
        if not seen["hosts"] and now > began + start_timeout:
            print(f"no nodes for the run's workers within {start_timeout} s (start_timeout)", flush=True)
            return seen
        if fence is not None and now > fenced + FENCE_SECONDS:
            fence.update()
            fenced = now
        first_ended = first_ended or (now if seen["statuses"] else None)
        if first_ended is not None and now > first_ended + stop_timeout:
            print(f"one process has ended, and others have not within {stop_timeout} s (stop_timeout)", flush=True)
            return seen
        fit.join(timeout=POLL_SECONDS)


def exit_status(error: Exception | None, seen: dict[str, Any], order: dict[str, Any]) -> int:
    """The driver's, from what the board had at last; leaves the lost nodes for the launcher.

    Args:
        error: of `fit`, if it raised one.
        seen: statuses of the processes in the order in which they ended, and lost_nodes.
        order: the driver's.
    """
    statuses = list(seen["statuses"].values())
    lost = set(seen["lost_nodes"])
    if isinstance(error, PreemptionError):
        lost |= set(error.preemption_info.preempted_node_ids)
    if isinstance(error, WorkerGroupError):
        lost |= {"unknown" for failure in error.worker_failures.values() if _was_preempted(failure)}
    if len(statuses) == order["cluster"]["workers"] and set(statuses) <= {DONE, PREEMPTED}:
        status = max(statuses)
    else:
        status = FAILURE
    if lost or (status == FAILURE and statuses[:1] == [PREEMPTED]):
        Path(order["lost_file"]).write_text(json.dumps(sorted(lost)))
    if status != FAILURE:
        return status
    if statuses and all(status == BAD_INPUT for status in statuses):
        return BAD_INPUT
    if isinstance(error, TrainingFailedError) and not statuses:
        print(f"Ray: {' '.join(str(error).split())[-500:]}", flush=True)
    for rank, status in sorted(seen["statuses"].items()):
        if status not in (DONE, PREEMPTED):
            print(f"process {rank} ended with status {status}", flush=True)
    return FAILURE


def _was_preempted(failure: Any) -> bool:
    """Whether Ray says of a worker's death that its node was taken away."""
    return bool(getattr(getattr(failure, "health_check_failure", failure), "preempted", False))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
