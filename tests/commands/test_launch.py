"""The command that launches runs: its command lines, and runs of real processes on this machine."""

import os
import subprocess
import sys

import pytest
import yaml

from sophia_levanter.cluster.config import ClusterConfig
from sophia_levanter.cluster.record import LaunchRecord
from sophia_levanter.commands import launch

FAST = ["--optimizer.type", "adamw"]  # one step to compile


def main(capsys, *words):
    status = launch.main(list(map(str, words)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def cluster_file(tmp_path, text="backend: local\nprocesses: 2\n"):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_a_dry_run_shows_the_commands_and_writes_nothing(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "hunter2")
    cluster = cluster_file(tmp_path, "backend: local\nprocesses: 2\nenv: {A: \"x y; $(b) 'c'\"}\nsecrets: [MY_KEY]\n")
    run_dir = tmp_path / "the run"
    before = sorted(tmp_path.iterdir())
    words = ["--config", config_file, "--cluster", cluster, "--trainer.run_dir", run_dir, "--dry_run"]
    status, out, err = main(capsys, *words)
    assert (status, err) == (0, "")
    assert "hunter2" not in out
    assert sorted(tmp_path.iterdir()) == before
    lines = out.splitlines()
    assert lines[0] == "on this machine (nothing is billed):"
    # A shell takes what is shown as it was meant; values of env are masked.
    shown = subprocess.run(
        ["bash", "-c", lines[2].replace(sys.executable, "printf '%s\\n' \"$A\"")],
        env={**os.environ, "A": "masked"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert lines[2].startswith("A='***' ")
    assert shown[0] == "masked"
    assert str(run_dir / "launch" / "config.yaml") in shown
    assert shown[-1] == "1"


@pytest.mark.parametrize("cluster", ["backend: local\n", "backend: ray\nworkers: 2\n", "backend: slurm\nnodes: 1\n"])
def test_a_dry_run_masks_the_values_of_env(cluster, config_file, tmp_path, capsys):
    file = cluster_file(tmp_path, cluster + "env: {A: hunter2, B: hunter2 too}\n")
    run_dir = tmp_path / "run"
    status, out, err = main(
        capsys, "--config", config_file, "--cluster", file, "--trainer.run_dir", run_dir, "--dry_run"
    )
    assert status == 0, err
    assert "hunter2" not in out + err
    assert "A=" in out and "***" in out


def test_a_dry_run_of_ray(config_file, tmp_path, capsys):
    cluster = cluster_file(tmp_path, "backend: ray\naccelerator: v4-32\nslices: 2\n")
    words = ["--trainer.batch_size", 32, "--trainer.microbatch_size", 32]
    words += ["--config", config_file, "--cluster", cluster, "--trainer.run_dir", tmp_path / "run", "--dry_run"]
    status, out, _ = main(capsys, *words)
    assert status == 0
    assert out.startswith(
        "on the Ray cluster auto (RAY_AUTH_MODE disabled): 8 processes on 2 whole slices of "
        "v4-32: 16 chips (2x2x4), 4 hosts, 512 GiB\nbilled: the nodes"
    )


def test_a_cluster_of_a_plug_in(config_file, tmp_path, monkeypatch, capsys):
    """It starts processes, or submits a job that runs the launcher elsewhere, without an edit of the launcher."""
    (tmp_path / "queue_cluster.py").write_text(
        "from dataclasses import dataclass\n"
        "from sophia_levanter.cluster.config import ClusterConfig, LocalCluster, Submission\n"
        "@ClusterConfig.register_subclass('queue')\n"
        "@dataclass(frozen=True)\n"
        "class QueueCluster(LocalCluster):\n"
        "    def submission(self, job, launcher):\n"
        "        if self.processes == 1:\n"
        "            return None\n"
        "        return Submission(lambda: ['would queue', *launcher], lambda say: 0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for known, name in ((sys.modules, "queue_cluster"), (ClusterConfig.get_known_choices(), "queue")):
        monkeypatch.setitem(known, name, None)  # is undone after the test
        del known[name]
    for processes, shown in ((1, "on this machine (nothing is billed):"), (2, "would queue")):
        cluster = cluster_file(tmp_path, f"backend: queue\nprocesses: {processes}\n")
        words = ["--plugins", "queue_cluster", "--config", config_file, "--cluster", cluster, "--dry_run"]
        status, out, err = main(capsys, *words)
        assert (status, err) == (0, "")
        assert out.splitlines()[0] == shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config FILE is missing; for example, --config config/gpt2_large_sophia.yaml"),
        (["--config", "CONFIG"], "--cluster FILE is missing; for example, --cluster infra/local.yaml"),
        (["--config", "CONFIG", "--cluster", "nowhere.yaml"], "nowhere.yaml: file not found"),
        (["--config", "CONFIG", "--cluster", "CONFIG"], "backend is missing"),
        (
            ["--config", "CONFIG", "--cluster", "CLUSTER", "--mesh.coordinator", "auto", "--trainer.run_dir", "run"],
            "mesh.coordinator is 'auto', but the launcher sets it; remove the setting",
        ),
        (
            ["--config", "CONFIG", "--cluster", "CLUSTER", "--trainer.run_dir", "CONFIG"],
            "is a file; specify a directory",
        ),
        (
            ["--config", "CONFIG", "--cluster", "CLUSTER", "--trainer.run_dir", "/proc/no/run"],
            "/proc/no/run cannot be used",
        ),
        (["status"], "expected one run directory"),
        (["status", "a", "b"], "expected one run directory"),
        (["logs", "FOLDER"], "contains no launched run"),
        (["stop", "nowhere"], "nowhere contains no launched run"),
        (["stats", "FOLDER"], "unknown command 'stats'; choose from status, logs, stop; did you mean status?"),
        (
            ["--config", "CONFIG", "--cluster", "CLUSTER", "--trainer.run_dir", "gs://bucket/run"],
            "trainer.run_dir gs://bucket/run is a URL; specify a directory (only trainer.checkpoint_dir may be a URL)",
        ),
    ],
)
def test_bad_input(words, message, config_file, tmp_path, capsys):
    places = {"CONFIG": config_file, "CLUSTER": cluster_file(tmp_path), "FOLDER": tmp_path}
    status, out, err = main(capsys, *(places.get(word, word) for word in words))
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("backend: gcloud\nzone: z\naccelerator: v4-64\n", "batch_size 16 is not divisible by the 32 devices"),
        ("backend: ray\naccelerator: v4-32\n", "microbatch_size 8 is not divisible by the 16 devices"),
        ("backend: ray\nworkers: 2\ngpus_per_worker: 8\n", "microbatch_size 8 is not divisible by the 16 devices"),
        ("backend: slurm\nnodes: 4\ngpus_per_node: 4\n", "microbatch_size 8 is not divisible by the 16 devices"),
    ],
)
def test_a_batch_that_does_not_divide_is_found_before_anything_is_paid_for(
    cluster, message, config_file, tmp_path, capsys
):
    words = ["--config", config_file, "--cluster", cluster_file(tmp_path, cluster), "--dry_run"]
    status, _, err = main(capsys, *words)
    assert status == 2
    assert f"trainer.{message} on mesh.data" in err


def test_a_bucket_is_needed_where_hosts_share_no_disk(config_file, tmp_path, capsys):
    cluster = cluster_file(tmp_path, "backend: gcloud\nzone: us-central2-b\naccelerator: v4-8\n")
    status, _, err = main(capsys, "--config", config_file, "--cluster", cluster, "--trainer.checkpoint_dir", "ckpt")
    assert status == 2
    assert "trainer.checkpoint_dir is ckpt, but TPU hosts do not share a disk" in err


def test_files_for_the_hosts_that_are_missing_are_found_before_anything_is_paid_for(
    config_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "constraints.txt").touch()
    slices = "backend: gcloud\nzone: us-central2-b\naccelerator: v4-8\nfiles: [dist/a.whl, constraints.txt, b.whl]\n"
    words = ["--config", config_file, "--cluster", cluster_file(tmp_path, slices)]
    words += ["--trainer.checkpoint_dir", "gs://bucket/run"]
    for further in ([], ["--dry_run"]):
        status, out, err = main(capsys, *words, *further)
        assert (status, out) == (2, "")
        assert err.startswith("error: files: dist/a.whl, b.whl not found; paths are relative to the working ")
        assert err.count("\n") == 1


def test_a_run_of_one_process_then_again_then_another(config_file, tmp_path, capfd):
    """A launched run that is done is done; its directory is not for another run."""
    cluster, run_dir = cluster_file(tmp_path, "backend: local\n"), tmp_path / "run"
    words = ["--config", config_file, "--cluster", cluster, "--trainer.run_dir", run_dir, *FAST]
    status, out, _ = main(capfd, *words)
    assert status == 0
    assert "launch: attempt 1: 1 process, step 12/12, loss " in out
    assert yaml.safe_load((run_dir / "launch" / "config.yaml").read_text())["trainer"]["run_dir"] == str(run_dir)

    status, out, _ = main(capfd, *words)
    assert status == 0
    assert "all 12 steps are done" in out

    status, _, err = main(capfd, *words, "--optimizer.b1", "0.8")
    assert status == 2
    assert f"trainer.run_dir {run_dir} contains another run: its optimizer.b1 is 0.9" in err

    status, out, _ = main(capfd, "status", run_dir)
    assert (status, out) == (0, "done; 1 process (local); attempt 2; step 12; 0 failures, 0 preemptions\n")
    assert "step 12/12" in main(capfd, "logs", run_dir, "--attempt", "1", "--process", "0")[1]
    assert "all 12 steps are done" in main(capfd, "logs", run_dir)[1]
    assert main(capfd, "stop", run_dir)[1].startswith("nothing is running\ndone; 1 process")
    for wrong, message in (
        ("--attempt", "--attempt 7 has no logs; attempts with logs: attempt-001, attempt-002"),
        ("--process", "--process 7 has no logs; processes with logs: process-0"),
    ):
        status, _, err = main(capfd, "logs", run_dir, wrong, "7")
        assert status == 2 and message in err


def test_secrets_that_are_not_set_are_found_before_anything_starts(config_file, tmp_path, monkeypatch, capsys):
    """They are reported with the other mistakes."""
    monkeypatch.delenv("MY_KEY", raising=False)
    monkeypatch.setenv("EMPTY_KEY", "")
    cluster = cluster_file(tmp_path, "backend: local\nsecrets: [MY_KEY, EMPTY_KEY]\n")
    words = ["--config", config_file, "--cluster", cluster, "--trainer.run_dir", tmp_path / "run"]
    missing = [
        f"secrets lists {name}, which is not set in the launcher's environment; export it first"
        for name in ("MY_KEY", "EMPTY_KEY")
    ]
    assert main(capsys, *words) == (2, "", f"error: {'; and '.join(missing)}\n")
    status, _, err = main(capsys, *words, "--mesh.coordinator", "auto")
    assert status == 2 and err.count("\n") == 1
    assert "mesh.coordinator is 'auto', but the launcher sets it" in err and missing[0] in err
    status, out, err = main(capsys, *words, "--dry_run")
    assert status == 0 and out and err == f"warning: {'; and '.join(missing)}\n"
    assert not (tmp_path / "run").exists()


def test_a_run_whose_launcher_is_gone(tmp_path, capsys):
    (tmp_path / "launch").mkdir()
    fields = '"backend": "local", "processes": 2, "progress": null, "exit_status": null'
    (tmp_path / "launch" / "status.json").write_text(f'{{"state": "running", {fields}}}')
    status, out, _ = main(capsys, "status", tmp_path)
    assert status == 1
    assert "the launcher has died, so the run has stopped" in out
    for damaged in ("{", "[]", "", fields, f'{{"state": "running", {fields}}}'.replace("2", '"x"')):
        (tmp_path / "launch" / "status.json").write_text(damaged)
        status, out, err = main(capsys, "status", tmp_path)
        assert (status, out) == (2, "")
        assert err.endswith("status.json is damaged; run the same launch command again to continue the run\n")


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_stop_the_run(config_file, tmp_path):
    words = ["--config", str(config_file), "--cluster", str(cluster_file(tmp_path, "backend: local\n"))]
    words += ["--trainer.run_dir", str(tmp_path / "run"), "--trainer.log_every", "1", *FAST]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "sophia_levanter.commands.launch", *words], stdout=subprocess.PIPE, text=True
    )
    launcher.stdout.readline()
    launcher.stdout.close()
    assert launcher.wait(timeout=100) == 0
    assert "step 12/12" in (tmp_path / "run" / "launch" / "attempt-001" / "process-0.log").read_text()
    assert LaunchRecord(tmp_path / "run" / "launch").read().state == "done"


def test_a_mistake_that_only_the_run_finds_ends_it_at_once(config_file, tmp_path, capfd):
    cluster = cluster_file(tmp_path, "backend: local\n")
    words = ["--config", config_file, "--cluster", cluster, "--trainer.run_dir", tmp_path / "run"]
    status, out, _ = main(capfd, *words, "--trainer.batch_size", "3", "--trainer.microbatch_size", "3")
    assert status == 2
    assert "error: trainer.batch_size 3 is not divisible by" in out.splitlines()[-1]
    assert "launch: " not in out
