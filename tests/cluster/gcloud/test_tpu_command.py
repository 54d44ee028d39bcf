"""The command for people: TPU slices by hand, with the real gcloud against a fake API."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_tpu_api import FakeTpuApi, hosts_of_this_machine, serving

from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.config import read_cluster
from sophia_levanter.cluster.gcloud import GcloudBackend
from sophia_levanter.cluster.gcloud.commands import GcloudCommands
from sophia_levanter.commands import tpu

INFRA = Path(__file__).parents[3] / "infra" / "tpu"
needs_gcloud = pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")


@pytest.fixture
def cluster_file(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("backend: gcloud\nzone: us-central2-b\naccelerator: v4-16\nslices: 2\nname: mine\n")
    return str(file)


@needs_gcloud
@pytest.mark.slow
def test_slices_by_hand(cluster_file, tmp_path, monkeypatch, capfd):
    hosts_of_this_machine(tmp_path)
    with serving(FakeTpuApi(hosts=2, states=["ACTIVE"])) as api:
        for name, value in api.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        assert tpu.main(["create", "--cluster", cluster_file]) == 0
        (body,) = api.bodies("POST", "queuedResourceId=mine")
        assert body["tpu"]["nodeSpec"][0]["multisliceParams"] == {"nodeCount": 2, "nodeIdPrefix": "mine"}
        capfd.readouterr()

        assert tpu.main(["list", "--cluster", cluster_file]) == 0
        (line,) = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("mine")]
        assert (line[0], line[-1]) == ("mine", "ACTIVE")

        words = ["printf", "<%s>\n", "two  spaces", "$(id); 'q'"]
        assert tpu.main(["ssh", "--cluster", cluster_file, "--", *words]) == 0
        assert sorted(capfd.readouterr().out.splitlines()).count("<two  spaces>") == 4
        (tmp_path / "hosts" / "192.0.2.17" / "only here").touch()
        assert tpu.main(["ssh", "--cluster", cluster_file, "--", 'ls | grep -c "only here"']) == 1
        assert sorted(line for line in capfd.readouterr().out.splitlines() if line in "01") == ["0", "0", "0", "1"]

        assert tpu.main(["delete", "--cluster", cluster_file]) == 0
        assert len(api.bodies("DELETE", "/queuedResources/mine?alt=json&force=True")) == 1
        assert tpu.main(["create", "--cluster", cluster_file]) == 1
        assert "ALREADY_EXISTS" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ["create"],
            "create mine --node-count=2 --node-prefix=mine --accelerator-type=v4-16 "
            "--runtime-version=tpu-ubuntu2204-base --zone=us-central2-b --async --quiet",
        ),
        (["create", "mine"], "create mine --node-count=2"),
        (["list"], "list --zone=us-central2-b"),
        (["delete"], "delete mine --zone=us-central2-b --force --async --quiet"),
    ],
)
def test_dry_run(arguments, command, cluster_file, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert tpu.main([*arguments, "--cluster", cluster_file, "--dry_run"]) == 0
    assert capsys.readouterr().out.startswith(f"gcloud compute tpus queued-resources {command}")


def test_dry_run_of_what_goes_to_hosts(cluster_file, capsys):
    assert tpu.main(["ssh", "--cluster", cluster_file, "--dry_run", "--", "ls", "--help", "a b"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line[5], line[-1]) for line in lines] == [(f"mine-{i}", "--command=ls --help 'a b'") for i in (0, 1)]
    assert tpu.main(["logs", "--cluster", cluster_file, "--dry_run"]) == 0
    (line,) = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert (line[5], "--worker=0" in line) == ("mine-0", True)


def test_logs_are_the_newest_ones(cluster_file, tmp_path):
    folder = tmp_path / "sophia_levanter-mine-logs"
    folder.mkdir()
    for stamp in ("20261231T235959-bb", "20270101T000000-aa"):
        (folder / f"{stamp}-attempt-1.log").write_text(f"{stamp}\n")
    words = GcloudCommands(read_cluster(Path(cluster_file)), "mine").newest_log()
    process = subprocess.Popen(["bash", "-c", f"exec {words}"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "20270101T000000-aa\n"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "error: no command given; choose from create, list, delete, ssh, logs"),
        (["lst"], "error: unknown command 'lst'; choose from create, list, delete, ssh, logs; did you mean list?"),
        (["list"], "error: --cluster FILE is missing"),
        (["list", "--cluster", "nowhere.yaml"], "error: nowhere.yaml"),
        (["delete", "other", "--cluster", "FILE"], "error: other differs from the name in the cluster file, mine"),
        (["create", "--cluster", "UNNAMED"], "error: name is missing"),
        (["list", "--cluster", "LOCAL"], "error: LOCAL: backend is local; tpu requires backend gcloud"),
        (["ssh", "--cluster", "FILE"], "error: ssh requires -- COMMAND..."),
        (["delete", "--cluster", "FILE", "--", "x"], "error: delete does not take -- COMMAND"),
        (["delete", "--cluster", "FILE", "mine", "more"], "error: unexpected argument 'more'"),
    ],
)
def test_bad_input(arguments, wanted, cluster_file, tmp_path, capsys):
    files = {"FILE": cluster_file, "UNNAMED": str(tmp_path / "unnamed.yaml"), "LOCAL": str(tmp_path / "local.yaml")}
    Path(files["UNNAMED"]).write_text("backend: gcloud\nzone: us-central2-b\naccelerator: v4-8\n")
    Path(files["LOCAL"]).write_text("backend: local\n")
    assert tpu.main([files.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(wanted.replace("LOCAL", files["LOCAL"]))
    assert error.count("\n") == 1


def test_gcloud_is_missing(cluster_file, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert tpu.main(["list", "--cluster", cluster_file]) == 2
    assert "the gcloud command was not found; install it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "hosts", "paid"),
    [
        ("v4_32.yaml", 4, "1 x v4-32: 16 chips (2x2x4), 4 hosts, 512 GiB; on-demand"),
        ("v5e_16_spot.yaml", 4, "1 x v5litepod-16: 16 chips (4x4), 4 hosts, 256 GiB; spot"),
        ("v5p_128_reserved.yaml", 16, "1 x v5p-128: 64 chips (4x4x4), 16 hosts, 6,080 GiB; reserved"),
        ("v6e_64_spot_2_slices.yaml", 32, "2 x v6e-64: 64 chips (8x8), 16 hosts, 2,048 GiB; spot"),
    ],
)
def test_the_files_for_clusters(file, hosts, paid):
    backend = GcloudBackend(read_cluster(INFRA / file), Path("runs/a"))
    assert backend.num_processes == hosts
    assert backend.describe(Job(Path("runs/a"), Path("runs/a/launch")))[2].startswith(f"billed: {paid}, ")
