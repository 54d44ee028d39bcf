"""Runs on real Ray clusters, whose nodes are processes of this machine, and what befalls them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from launched import Launched, losses, metrics, training_process

from tiny_runs import xla_flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head without CPUs, and two nodes of one CPU each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def cluster_file(tmp_path, cluster, *lines):
    path = tmp_path / "cluster.yaml"
    # Ray's nodes have the environment of these tests.
    variables = f"{{JAX_PLATFORMS: cpu, XLA_FLAGS: {xla_flags()}}}"
    text = [f"address: {cluster.address}", f"env: {variables}", "stop_timeout: 60", *lines]
    path.write_text("\n".join(["backend: ray", *text]))
    return path


def test_two_nodes_train_as_one_process(cluster, undisturbed, tmp_path):
    """And what is secret reaches both, and stands nowhere."""
    secret = {"THE_API_KEY": "correct-horse-battery"}
    file = cluster_file(tmp_path, cluster, "workers: 2", "secrets: [THE_API_KEY]")
    with Launched(tmp_path / "run", file, env=secret) as run:
        run.until_step(2)
        for i in range(2):
            assert training_process(run.run_dir, i).environ()["THE_API_KEY"] == secret["THE_API_KEY"]
        command_lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        assert run.wait() == 0, run.text
    assert "devices: 2 cpu devices, data 2, embed over data" in run.text
    np.testing.assert_allclose(losses(run.run_dir), undisturbed, rtol=0, atol=1e-5)
    status = run.status()
    assert (status["state"], status["failures"], status["preemptions"], status["exit_status"]) == ("done", 0, 0, 0)
    assert (run.run_dir / "launch" / "attempt-001" / "process-1.log").exists()
    session = Path(cluster.head_node.get_session_dir_path())
    kept = [path for top in (run.run_dir, session) for path in top.rglob("*") if path.is_file()]
    assert any(path.name.startswith("raylet") for path in kept)
    texts = [path.read_bytes() for path in [*kept, run.output]]
    assert not any(secret["THE_API_KEY"].encode() in text for text in texts)
    assert not any(secret["THE_API_KEY"] in line for line in command_lines)


def kill_training_process(run, cluster):
    training_process(run.run_dir, 1).kill()


def kill_worker_of_the_coordinator(run, cluster):
    training_process(run.run_dir, 0).parent().kill()


def kill_raylet(run, cluster):
    """A node is gone; another comes."""
    node = sorted(cluster.worker_nodes, key=lambda node: node.start_time if hasattr(node, "start_time") else 0)[-1]
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


def stop_training_process(run, cluster):
    training_process(run.run_dir, 1).send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    "harm", [kill_training_process, kill_worker_of_the_coordinator, kill_raylet, stop_training_process]
)
def test_the_run_goes_on_in_fresh_processes(harm, cluster, undisturbed, tmp_path):
    with Launched(tmp_path / "run", cluster_file(tmp_path, cluster, "workers: 2", "back_off: 1")) as run:
        run.until_step(15)
        before = {training_process(run.run_dir, i).pid for i in range(2)}
        harmed = time.monotonic()
        harm(run, cluster)
        run.until(lambda: "resuming after step" in run.text and metrics(run.run_dir)[-1]["step"] > 10, "resumption")
        run.until(lambda: f"step {resumed(run) + 2}/40" in run.text.split("resuming after step")[1], "step after it")
        print(f"{harm.__name__}: {time.monotonic() - harmed:.1f} s from the harm to the second step after it")
        assert before.isdisjoint(training_process(run.run_dir, i).pid for i in range(2))
        assert run.wait() == 0, run.text
    np.testing.assert_allclose(losses(run.run_dir), undisturbed, rtol=0, atol=1e-5)
    status = run.status()
    assert (status["state"], status["attempt"], status["failures"], status["preemptions"]) == ("done", 2, 1, 0)


def resumed(run):
    return int(run.text.split("resuming after step ")[1].split()[0])


POD = "v4-16"


def slice_nodes(cluster, name):
    """Two hosts of four pretended chips."""
    return [
        cluster.add_node(
            num_cpus=1,
            resources={"TPU": 4, "accelerator_type:TPU-V4": 1, **({f"TPU-{POD}-head": 1} if worker == 0 else {})},
            labels={
                "ray.io/tpu-slice-name": name,
                "ray.io/tpu-worker-id": str(worker),
                "ray.io/tpu-topology": "2x2x2",
                "ray.io/tpu-pod-type": POD,
                "ray.io/accelerator-type": "TPU-V4",
            },
            env_vars={
                "TPU_NAME": name,
                "TPU_WORKER_ID": str(worker),
                "TPU_ACCELERATOR_TYPE": POD,
                "TPU_TOPOLOGY": "2x2x2",
            },
        )
        for worker in range(2)
    ]


@pytest.fixture
def slices(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {name: slice_nodes(cluster, name) for name in ("slice-a", "slice-b")}
    yield cluster, nodes
    cluster.shutdown()


def test_a_slice_that_is_taken_away_is_left_for_a_whole_one(slices, undisturbed, tmp_path):
    cluster, nodes = slices
    with Launched(tmp_path / "run", cluster_file(tmp_path, cluster, f"accelerator: {POD}")) as run:
        run.until_step(12)
        name = training_process(run.run_dir, 0).environ()["TPU_NAME"]
        assert training_process(run.run_dir, 1).environ()["TPU_NAME"] == name
        drained = nodes[name][1]
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address),
                *("--node-id", drained.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
                *("--reason-message", "rehearsal", "--deadline-remaining-seconds", "12"),
            ],
            check=True,
        )
        run.until(lambda: "attempt 1:" in run.text, "end of the attempt")
        cluster.remove_node(drained, allow_graceful=False)
        other = ({"slice-a", "slice-b"} - {name}).pop()
        second = run.until(lambda: "resuming" in run.text and training_process(run.run_dir, 1), "second attempt")
        assert second.environ()["TPU_NAME"] == other
        assert run.wait() == 0, run.text
    # All saved the step they had come to, so no step was done twice.
    saved = int(run.text.split("SIGTERM: stopped after step ")[1].split(",")[0])
    assert resumed(run) == saved
    np.testing.assert_allclose(losses(run.run_dir), undisturbed, rtol=0, atol=1e-5)
    status = run.status()
    assert (status["state"], status["failures"], status["preemptions"]) == ("done", 0, 1)
    assert json.loads((run.run_dir / "launch" / "attempt-001" / "lost_nodes.json").read_text()) == [drained.node_id]
