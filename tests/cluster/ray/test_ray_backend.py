"""What the launcher and a driver of Ray tell each other, without a cluster."""

import json
import os
from types import SimpleNamespace

import pytest
from ray._private.accelerators.tpu import infer_tpu_pod_type_from_topology
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from sophia_levanter.cluster.backend import Job, Unavailable, free_port
from sophia_levanter.cluster.config import RayCluster
from sophia_levanter.cluster.ray import RayBackend, driver
from sophia_levanter.cluster.ray.driver import broken_slices
from sophia_levanter.cluster.ray.worker import Board
from sophia_levanter.errors import InputError
from sophia_levanter.planning.target import GENERATIONS, shapes_of, tpu_shape


def job_in(tmp_path):
    job = Job(tmp_path / "run", tmp_path / "run" / "launch")
    for attempt in (1, 2):
        job.attempt_directory(attempt).mkdir(parents=True)
    job.config_file.write_text("trainer: {}\n")
    return job


def order_of(job, backend, attempt):
    (command,) = backend.commands(job, attempt)
    return command, json.loads(job.attempt_directory(attempt).joinpath("ray.json").read_text())


def test_the_order_of_an_attempt_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "correct-horse-battery")
    job = job_in(tmp_path)
    backend = RayBackend(RayCluster(accelerator="v5e-16", slices=2, env={"A": "b c"}, secrets=("THE_KEY",)))
    backend.prepare(job, 1, print, lambda: False)
    command, order = order_of(job, backend, 1)
    assert command.env == {"RAY_AUTH_MODE": "disabled"}
    assert RayCluster(**order["cluster"]) == RayCluster(
        accelerator="v5e-16", slices=2, env={"A": "b c"}, secrets=["THE_KEY"]
    )
    assert order["config"] == "trainer: {}\n"
    assert not any(b"correct" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_secret_must_be_there(tmp_path, monkeypatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    backend = RayBackend(RayCluster(workers=2, secrets=("THE_KEY",)))
    with pytest.raises(InputError, match="secrets lists THE_KEY, which is not set"):
        backend.prepare(job_in(tmp_path), 1, print, lambda: False)


@pytest.mark.parametrize("host", ["127.0.0.1", "ray..head"])
def test_an_address_where_nothing_listens(host, tmp_path):
    job = job_in(tmp_path)
    backend = RayBackend(RayCluster(workers=2, address=f"{host}:{free_port()}"))
    with pytest.raises(InputError, match="no response; start the cluster first"):
        backend.prepare(job, 1, print, lambda: False)
    # Once the run has begun there, its head may come back.
    backend.commands(job, 1)
    with pytest.raises(Unavailable, match=r"no response$"):
        backend.prepare(job, 2, print, lambda: False)


def test_nodes_that_were_taken_away_are_avoided_from_then_on(tmp_path):
    job = job_in(tmp_path)
    backend = RayBackend(RayCluster(workers=2))
    _, order = order_of(job, backend, 1)
    assert not backend.was_preempted() and not order["has_begun"]
    with open(order["lost_file"], "w") as file:
        json.dump(["node-1"], file)
    assert backend.was_preempted()
    _, order = order_of(job, backend, 2)
    assert order["lost_nodes"] == ["node-1"] and order["has_begun"]
    assert not backend.was_preempted()


@pytest.mark.parametrize(
    ("statuses", "lost_nodes", "status", "preempted"),
    [
        ({0: 0, 1: 0}, [], 0, False),
        ({1: 75, 0: 75}, [], 75, False),
        ({1: 75, 0: 75}, ["a"], 75, True),
        ({0: 2, 1: 2}, [], 2, False),
        ({0: 2}, [], 2, False),
        ({1: -9, 0: -6}, [], 1, False),
        ({1: -9}, ["a"], 1, True),
        ({1: 75}, [], 1, True),
        ({1: 75, 0: -6}, [], 1, True),
        ({0: -6, 1: 75}, [], 1, False),
        ({}, [], 1, False),
    ],
)
def test_the_drivers_exit_status(statuses, lost_nodes, status, preempted, tmp_path):
    seen = {"statuses": statuses, "lost_nodes": lost_nodes}
    assert driver.exit_status(None, seen, 2, tmp_path / "lost") == status
    assert (tmp_path / "lost").exists() == preempted


def test_the_board_has_all_stop_together_and_finish_together():
    board = Board(2)
    board.report(0, ["a"], None, [])
    board.report(1, ["b", "c"], None, [])
    assert board.verdict() == "go on"
    assert board.take()["lines"] == [(0, "a"), (1, "b"), (1, "c")]
    assert board.take()["lines"] == []
    board.report(1, [], None, ["node"])
    assert board.verdict() == "stop"
    board.report(0, [], 75, [])
    assert board.verdict() == "stop"
    board.report(1, [], 75, [])
    assert board.verdict() == "finish"
    assert board.take() == {"lines": [], "statuses": {0: 75, 1: 75}, "lost_nodes": ["node"], "hosts": 0}


def node(name, worker, alive=True, pod="v4-16"):
    labels = (
        {"ray.io/tpu-slice-name": name, "ray.io/tpu-pod-type": pod, "ray.io/tpu-worker-id": str(worker)} if name else {}
    )
    return {
        "NodeID": f"{name}{worker}",
        "Alive": alive,
        "Labels": labels,
        "Resources": {"TPU": 4} if name else {"CPU": 1},
    }


def test_slices_that_lack_a_host_are_broken():
    nodes = [node(None, 0), *(node(name, i) for name in "ab" for i in range(2))]

    def broken(nodes, lost=()):
        return broken_slices(nodes, tpu_shape("v4-16"), lost)

    assert broken(nodes) == set()
    assert broken(nodes[:-1]) == {"b"}
    assert broken([*nodes[:-1], node("b", 1, alive=False)]) == {"b"}
    assert broken(nodes, ("a1",)) == {"a"}
    # One that is gone altogether, or lacks its first host, Ray does not reserve.
    assert broken([*nodes[:3], *(node("b", i, alive=False) for i in range(2))], ("b1",)) == set()
    assert broken([*nodes[:3], node("b", 1)]) == set()
    # Others' slices are left alone.
    assert broken([*nodes, node("c", 0, pod="v4-8"), node("d", 0, pod="v4-32")]) == set()


@pytest.mark.parametrize("shape", [shape for name in GENERATIONS for shape in shapes_of(name)], ids=str)
def test_ray_knows_every_slice_as_we_do(shape):
    accelerator = driver.ray_accelerator(shape.generation)
    scaling = ScalingConfig(
        num_workers=shape.hosts, use_tpu=True, topology=shape.topology, accelerator_type=accelerator
    )
    assert scaling.num_tpus_per_worker * shape.hosts == shape.chips
    assert infer_tpu_pod_type_from_topology(shape.topology, accelerator) == shape.accelerator_type


class Death(Exception):
    preempted = True


@pytest.mark.parametrize("wrap", [lambda death: death, lambda death: WorkerHealthCheckFailedError("worker 0", death)])
def test_a_preemption_that_came_without_notice(wrap, tmp_path):
    error = WorkerGroupError("a worker died", {0: wrap(Death()), 1: RuntimeError("of a collective")})
    assert driver.exit_status(error, {"statuses": {1: -6}, "lost_nodes": []}, 2, tmp_path / "lost") == 1
    assert (tmp_path / "lost").exists()
    (tmp_path / "lost").unlink()
    error = WorkerGroupError("a worker died", {0: RuntimeError("by itself")})
    assert driver.exit_status(error, {"statuses": {}, "lost_nodes": []}, 2, tmp_path / "lost") == 1
    assert not (tmp_path / "lost").exists()


@pytest.fixture
def ray_environment(monkeypatch):
    """Undoes what a driver sets."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


@pytest.mark.parametrize(("has_begun", "status"), [(False, 2), (True, 69)])
def test_a_cluster_whose_head_does_not_answer(has_begun, status, ray_environment, tmp_path, capsys, monkeypatch):
    (tmp_path / "order").write_text(json.dumps({"cluster": {"workers": 1}, "has_begun": has_begun}))

    def refuse(**options):
        raise ConnectionError("Could not find any running Ray\ninstance")

    monkeypatch.setattr("ray.init", refuse)
    assert driver.main(tmp_path / "order") == status
    assert capsys.readouterr().out == "error: address auto: Could not find any running Ray\n"


def test_nodes_that_do_not_come(ray_environment, tmp_path, capsys, monkeypatch):
    class Waiting:
        def __init__(self, trainer):
            self.error = None

        def start(self):
            pass

        def is_alive(self):
            return True

        def join(self, timeout):
            pass

    class Local:
        """A board in this process, called as an actor is."""

        def __init__(self, board):
            self.board = board

        def __getattr__(self, name):
            return SimpleNamespace(remote=getattr(self.board, name))

    actors = SimpleNamespace(remote=lambda *arguments: Local(Board(*arguments)))
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.remote", lambda **options: lambda kind: actors)
    monkeypatch.setattr("ray.get", lambda result: result)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(driver, "_trainer", lambda *arguments: None)
    monkeypatch.setattr(driver, "_Fit", Waiting)
    monkeypatch.setattr(driver.signal, "signal", lambda *arguments: None)
    order = {"cluster": {"workers": 1, "start_timeout": 1}, "has_begun": False, "lost_file": str(tmp_path / "lost")}
    (tmp_path / "order").write_text(json.dumps(order))
    assert driver.main(tmp_path / "order") == 69
    message = "no nodes were found for the run's workers within 1 s (start_timeout)"
    assert capsys.readouterr().out == f"error: {message}\n"
