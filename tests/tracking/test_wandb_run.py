"""Runs of Weights & Biases: offline, as `wandb sync` would read them, and where no server answers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_wandb import fake_wandb, offline_runs

from sophia_levanter.config.run import TrackingConfig
from sophia_levanter.tracking.wandb import Wandb

SECRET = "s3cr3t" * 8

PROGRAM = """
import sys
from pathlib import Path
from sophia_levanter.tracking import wandb as tracking_wandb
from sophia_levanter.config.run import TrackingConfig
from sophia_levanter.tracking.console import Console
from sophia_levanter.tracking.trackers import start_optional
tracking_wandb.INIT_SECONDS, tracking_wandb.FINISH_SECONDS = int(sys.argv[2]), 3
directory = Path(sys.argv[1])
config, console = TrackingConfig(wandb="online"), Console()
others = start_optional(config, directory, run_id="abc", first_step=0, facts={}, max_grad_norm=None, console=console)
others.log(0, {"train/loss": 2.0})
others.close(failed=False)
"""


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch, tmp_path):
    """No account, no settings and no reports of errors."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_offline(tmp_path, capfd):
    config, said = TrackingConfig("offline", "a project", wandb_group="a group"), []
    for first, failed in ((0, True), (2, False)):
        run = Wandb(config, tmp_path, "abc", {"model": {"num_layers": 2 + first}}, said.append, said.append)
        for step in range(first, 4):
            rms = {"a/0": 1.0, "a/1": float("nan"), "b": 2.0} if step == 3 else {}
            statistics = {f"statistics/{place}/weight_rms": value for place, value in rms.items()}
            run.log(step, {"train/loss": step + first / 10, **statistics})
        run.close(failed=failed)
    out, err = capfd.readouterr()
    assert not out and not err, "wandb says nothing of its own"
    first, second = offline_runs(tmp_path)
    assert [line.partition(": offline; upload it with: wandb sync ")[::2] for line in said] == [
        ("wandb", str(folder)) for folder in sorted(tmp_path.glob("wandb/offline-run-*"))
    ]
    names = {"id": "abc", "name": tmp_path.name, "project": "a project", "group": "a group", "axis": ("*", "step")}
    assert first.items() >= names.items() and second.items() >= names.items()
    assert first["config"]["model"] == {"num_layers": 2} and second["config"]["model"] == {"num_layers": 4}
    assert [(row["step"], row["train/loss"]) for row in first["history"]] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [(row["step"], row["train/loss"]) for row in second["history"]] == [(2, 2.2), (3, 3.2)]
    assert (first["exit"], second["exit"]) == (1, 0)
    # Of the statistics of arrays there is a histogram of each kind, over all arrays and layers.
    assert "statistics" not in str(first["history"][:3]) and "statistics/a" not in str(first["history"])
    row = first["history"][3]
    values, bins = row["statistics/weight_rms/values"], row["statistics/weight_rms/bins"]
    assert sum(values) == 2 and (bins[0], bins[-1]) == (1, 2)


def online_run(directory: Path, server: str, key: str, seconds: str = "20") -> subprocess.CompletedProcess:
    environment = {**os.environ, "WANDB_BASE_URL": server} | ({"WANDB_API_KEY": key} if key else {})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), seconds],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def silent_server():
    """The address of one that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "key",
    [SECRET, *(pytest.param(key, marks=pytest.mark.slow) for key in (None, "short", f"{SECRET} to a silent server"))],
    ids=["refused", "no_key", "bad_key", "silent"],
)
def test_where_no_server_answers_the_run_is_offline(key, silent_server, tmp_path):
    key, _, silent = (key or "").partition(" to ")
    server = silent_server if silent else "http://127.0.0.1:9"
    done = online_run(tmp_path, server, key, seconds="1")
    assert not done.stderr
    (line,) = done.stdout.splitlines()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert line.startswith("WARNING: wandb: ")
    assert line.endswith(f"; the run will be logged offline; upload it with: wandb sync {folder}")
    (run,) = offline_runs(tmp_path)
    assert run["history"][0]["train/loss"] == 2.0
    if key == SECRET:
        files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
        assert SECRET not in done.stdout and not [f for f in files if SECRET.encode() in f.read_bytes()]
    else:
        assert "API key" in line


@pytest.mark.slow
def test_online(tmp_path):
    with fake_wandb() as server:
        done = online_run(tmp_path, server.url, SECRET)
    assert done.stdout == f"wandb: {server.url}/somebody/a%20project/runs/abc\n" and not done.stderr
    assert server.run_ids == {"abc"} and server.losses == {0: 2.0}


@pytest.mark.slow
def test_a_server_that_goes_away_does_not_hold_the_end_up(tmp_path):
    with fake_wandb() as server:
        server.take = lambda stream: server.shutdown() or server.server_close()
        done = online_run(tmp_path, server.url, SECRET)
    (folder,) = tmp_path.glob("wandb/run-*")
    assert done.stdout.splitlines()[-1] == (
        "WARNING: wandb: not everything was uploaded within 3 s of the run's end; upload the rest with: "
        f"wandb sync {folder}; the run continues without it"
    )


def test_no_url_of_a_repository_is_kept(tmp_path, monkeypatch):
    for command in ("init -q", "remote add origin https://a-token:x@example.org/a/b.git"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    run = Wandb(TrackingConfig("offline"), tmp_path, "abc", {}, lambda _: None, lambda _: None)
    run.log(0, {"train/loss": 1.0})
    run.close(failed=False)
    files = [file for file in (tmp_path / "wandb").rglob("*") if file.is_file()]
    assert files and not [file for file in files if b"a-token" in file.read_bytes()]
