"""What the gcloud backend does on hosts: the real gcloud, a fake API, and hosts that are folders of this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gcloud_cases import AWKWARD, FAKE_PYTHON, backend, cluster, fake_python, spec

from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.gcloud import Acquisition, GcloudBackend
from sophia_levanter.cluster.gcloud.commands import Answer, GcloudCommands, QueuedResource, resource_name
from sophia_levanter.errors import InputError

slow = pytest.mark.slow  # each call of gcloud takes about a second
pytestmark = pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")


@slow
def test_a_run_on_slices_from_nothing_to_nothing(api, job, tmp_path):
    api.states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    said = []
    setup = ('echo "it\'s $((1 + 1))" >> installed', "cd /", 'touch "$HOME/the second line"')
    files = [tmp_path / "a wheel.whl", tmp_path / "constraints.txt"]
    for file in files:
        file.write_text(file.name)
    fields = {"setup": setup, "files": tuple(map(str, files)), "env": {"AWKWARD": AWKWARD}}
    slices = backend(python=fake_python(tmp_path), **fields)
    slices.prepare(job, 1, said.append, lambda: False)
    assert said == [
        "created queued resource a-run; it is billed from activation to deletion",
        *(f"queued resource a-run is {state}" for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")),
        "queued resource a-run: 1 x v4-32: 16 chips (2x2x4), 4 hosts, 512 GiB ready",
    ]
    hosts = sorted((tmp_path / "hosts").glob("*.*.*.*"))
    assert [host.name for host in hosts] == [f"192.0.2.{i}" for i in range(4)]
    for host in hosts:
        assert (host / "sophia_levanter-a-run.yaml").read_text() == "trainer: {}\n"
        assert [(host / file.name).read_text() for file in files] == [file.name for file in files]
        assert (host / "installed").read_text() == "it's 2\n"
        assert (host / "the second line").exists()

    # The next attempt: the same slices, on which setup is not run again.
    slices.prepare(job, 2, said.append, lambda: False)
    assert (hosts[0] / "installed").read_text() == "it's 2\n"
    assert len(api.bodies("POST", "queuedResourceId")) == 1
    commands = slices.commands(job, 2)
    assert [command.label for command in commands] == [f"process-{i}" for i in range(4)]
    command = commands[2]
    assert command.by_stdin
    process = subprocess.Popen(command.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    argv, env = json.loads(process.stdout.readline())
    assert process.wait(30) == 0
    assert argv == [
        *("-u", "-m", "sophia_levanter.main", "--config", "sophia_levanter-a-run.yaml", "--resume", "auto"),
        *("--mesh.coordinator", "10.0.0.0:20002", "--mesh.num_processes", "4", "--mesh.process_id", "2"),
    ]
    assert env["AWKWARD"] == AWKWARD
    (log,) = (hosts[2] / "sophia_levanter-a-run-logs").glob("*.log")
    assert log.name.endswith("-attempt-2.log")
    assert json.loads(log.read_text())[0] == argv

    slices.release(said.append)
    assert said[-1] == "queued resource a-run is being deleted"
    assert next(request[:2] for request in api.requests if request[0] == "DELETE") == (
        "DELETE",
        "/v2/projects/test-project/locations/us-central2-b/queuedResources/a-run?alt=json&force=True",
    )


class Deletions:
    """Answers gcloud for a resource that is there until it was deleted often enough."""

    def __init__(self, needed, state):
        self.needed, self.state, self.asked = needed, state, []

    def __call__(self, words, stopped=None):
        self.asked.append(words[4])
        if words[3] == "tpu-vm":
            return Answer(0, json.dumps({"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.1"}] * 4}), "")
        if words[4] != "describe":
            return Answer(0, "", "")
        if "create" not in self.asked and self.asked.count("delete") >= self.needed:
            return Answer(1, "", "ERROR: (gcloud.describe) NOT_FOUND: a-run")
        state = "ACTIVE" if "create" in self.asked else self.state
        return Answer(0, json.dumps(spec() | {"state": {"state": state}}), "")


def test_a_deletion_that_is_accepted_and_then_fails_is_repeated(monkeypatch):
    monkeypatch.setattr("sophia_levanter.cluster.gcloud.SETTLE", 0.1)
    monkeypatch.setattr("sophia_levanter.cluster.gcloud.commands.call", deletions := Deletions(2, "FAILED"))
    resource = QueuedResource(GcloudCommands(cluster(start_timeout=20), "a-run"))
    assert len(Acquisition(resource, 0.01, print, lambda: False).run()) == 1
    assert [verb for verb in deletions.asked if verb != "describe"] == ["delete", "delete", "create"]


@pytest.mark.parametrize(
    ("needed", "shown"), [(1, "is being deleted"), (2, "may still be billed: its accepted deletion")]
)
def test_slices_whose_deletion_does_not_begin_may_still_be_billed(needed, shown, monkeypatch):
    monkeypatch.setattr("sophia_levanter.cluster.gcloud.commands.call", Deletions(needed, "ACTIVE"))
    slices = backend()
    slices.was_preempted()  # finds the resource
    said = []
    slices.release(said.append)
    assert said[0].startswith(f"queued resource a-run {shown}")


@slow
def test_the_end_of_standard_input_reaches_the_process_and_its_status_comes_back(api, job, tmp_path):
    trap = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    )
    api.add("a-run", spec("v4-8"), ["ACTIVE"])
    api.hosts = 1
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON.split("\n")[0] + "\n" + FAKE_PYTHON.split("\n")[1].format(python=sys.executable))
    with python.open("a") as file:
        file.write(f"\nexec {sys.executable} -c {shlex.quote(trap)}\n")
    python.chmod(0o755)
    slices = backend(accelerator="v4-8", python=str(python))
    slices.prepare(job, 1, lambda text: None, lambda: False)
    (command,) = slices.commands(job, 1)
    process = subprocess.Popen(command.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(30) == 75


@slow
def test_a_line_of_setup_that_fails(api, job):
    api.add("a-run", spec(), ["ACTIVE"])
    slices = backend(setup=("echo before", "no-such-command | cat", "touch after"))
    with pytest.raises(InputError, match=r"^setup failed with status 127 on queued resource a-run:\n") as error:
        slices.prepare(job, 1, lambda text: None, lambda: False)
    assert "no-such-command: command not found" in str(error.value)
    assert not slices.commands(job, 1)


@pytest.mark.parametrize(
    ("status", "errors", "unreachable"),
    [
        (1, "SSH: Attempting to connect to worker 0...\n##### Command execution on worker 0 failed", False),
        (255, "Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", True),
        (1, "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) NOT_FOUND: Resource 'a-run' was not found", True),
    ],
)
def test_a_host_that_is_not_reached_is_not_bad_input(status, errors, unreachable):
    assert Answer(status, "", errors).unreachable is unreachable


@slow
@pytest.mark.parametrize("internal_ips", [False, True])
def test_arguments_arrive_unchanged_on_every_worker_of_two_slices(api, job, tmp_path, internal_ips):
    api.add("a-run", spec(nodeId=None, multisliceParams={"nodeCount": 2}), ["ACTIVE"])
    fields = {"slices": 2, "internal_ips": internal_ips, "env": {"AWKWARD": AWKWARD, "EMPTY": ""}}
    slices = backend(python=fake_python(tmp_path), **fields)
    slices.prepare(job, 7, lambda text: None, lambda: False)
    commands = slices.commands(job, 7)
    assert len(commands) == slices.num_processes == 8
    for number in range(8) if internal_ips else (1, 6):
        slice_id, worker = divmod(number, 4)
        words = [*commands[number].words, "--dry-run"]
        printed = subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
        ssh, remote = printed.split(" -- ", 1)
        address = f"192.0.2.{16 * slice_id + worker}"
        assert ssh.endswith(f"@{address}")
        assert ("start-iap-tunnel" in ssh) is internal_ips
        home = tmp_path / f"home {number}"
        home.mkdir()
        # Without end of its standard input, at which it would be told to stop.
        process = subprocess.Popen(
            ["bash", "-c", remote], cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        argv, env = json.loads(process.stdout.readline())
        assert process.wait(30) == 0
        mesh = dict(zip(argv[-6::2], argv[-5::2], strict=True))
        assert mesh == {
            "--mesh.coordinator": "10.0.0.0:20007",
            "--mesh.num_processes": "8",
            "--mesh.process_id": str(number),
        }
        assert {name: env[name] for name in fields["env"]} == fields["env"]
        assert {name: value for name, value in env.items() if name.startswith("MEGASCALE")} == {
            "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.0:21007",
            "MEGASCALE_PORT": "21007",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": str(slice_id),
        }
        assert [file.name for file in home.iterdir()] == ["sophia_levanter-a-run-logs"]


@pytest.mark.parametrize("found", [True, False])
def test_a_secret_is_fetched_on_the_host_and_written_nowhere(job, tmp_path, found):
    secret = "s3cret  $(value)'\""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    store = bin_folder / "gcloud"
    answer = f"printf %s {shlex.quote(secret)}" if found else "echo no such secret >&2; exit 1"
    store.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path / "asked"}\n{answer}\n')
    store.chmod(0o755)
    words = GcloudCommands(cluster(secrets=("WANDB_API_KEY",), project="a-project"), "a-run")
    script = words.training([sys.executable, "-c", "import os; print(os.environ['WANDB_API_KEY'])"], {}, "a.log")
    script = script.replace("exec python3 ", f"exec {sys.executable} ")
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = process.stdout.readline()
    assert process.wait(30) == (0 if found else 1)
    asked = (tmp_path / "asked").read_text()
    assert asked == "secrets versions access latest --secret=WANDB_API_KEY --project=a-project\n"
    assert output == (f"{secret}\n" if found else "")
    assert found or "no such secret" in process.stderr.read()


def test_a_secret_of_the_launcher_is_in_no_command(job, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    slices = backend(secrets=("WANDB_API_KEY",))
    assert "WANDB_API_KEY" in (lines := "\n".join(slices.describe(job)))
    assert "s3cret-value" not in lines


def test_values_of_env_are_masked_in_what_is_described_alone(job):
    slices = backend(env={"A": "hunter2", "B": "it's; hunter2"})
    lines = "\n".join(slices.describe(job))
    assert "hunter2" not in lines
    assert re.search(r"export A=\W*\*\*\*\W*; export B=\W*\*\*\*", lines)


def test_what_is_described_can_be_pasted(job):
    setup = ("echo it's; $(x)",)
    slices = backend(slices=2, capacity="spot", setup=setup, env={"AWKWARD": AWKWARD})
    lines = slices.describe(job)
    commands = [shlex.split(line) for line in lines if line.startswith("  gcloud")]
    words = GcloudCommands(cluster(slices=2, capacity="spot", setup=setup, env={"AWKWARD": AWKWARD}), "a-run")
    assert commands[0] == words.create()
    assert commands[1:3] == [
        words.scp(node, [str(job.config_file)], "sophia_levanter-a-run.yaml") for node in ("a-run-0", "a-run-1")
    ]
    assert commands[3:5] == [words.ssh(node, "all", words.setup()) for node in ("a-run-0", "a-run-1")]
    assert [re.findall(r"process_id (\d+)$", words[-1]) for words in commands[5:13]] == [[str(i)] for i in range(8)]
    assert commands[13:] == [words.delete()]
    paid = "billed: 2 x v4-32: 16 chips (2x2x4), 4 hosts, 512 GiB; spot, 32 chips in total, from activation"
    assert lines[2] == f"{paid} to deletion, at the prices on https://cloud.google.com/tpu/pricing"


def test_a_file_that_is_not_there(job):
    with pytest.raises(InputError, match=r"^files: nowhere\.whl not found; paths are relative to the working"):
        backend(files=("nowhere.whl",)).prepare(job, 1, print, lambda: False)


def test_another_wheel_is_installed_anew(tmp_path):
    wheel = tmp_path / "a.whl"
    words = GcloudCommands(cluster(setup=("true",), files=(str(wheel),)), "a-run")
    lines = []
    for content in ("one", "two", "one"):
        wheel.write_text(content)
        lines.append(words.setup())
    assert lines[0] == lines[2] != lines[1]


@pytest.mark.parametrize(
    ("run_dir", "name"),
    [("runs/My run", "my-run"), ("123_GPT.2", "gpt-2"), ("x" * 60, "x" * 33), ("a" * 32 + "_b", "a" * 32)],
)
def test_the_queued_resource_is_named_after_the_run_and_its_place(run_dir, name):
    slices = GcloudBackend(cluster(name=None), Path(run_dir))
    assert re.search(rf"queued resource {name}-[0-9a-f]{{6}} in", slices.describe(Job(Path(run_dir), Path(run_dir)))[0])
    assert resource_name(cluster(name=None), Path("/elsewhere", run_dir)) != slices._commands.name


def test_a_run_that_no_name_can_be_made_of():
    with pytest.raises(InputError, match=r"^name is missing and cannot be derived from '123'"):
        GcloudBackend(cluster(name=None), Path("123"))


@pytest.mark.slow  # gcloud waits for five seconds before it connects again
def test_a_connection_that_breaks_does_not_start_the_process_twice(api, job, tmp_path):
    api.add("a-run", spec("v4-8"), ["ACTIVE"])
    api.hosts = 1
    slices = backend(accelerator="v4-8", python=fake_python(tmp_path))
    slices.prepare(job, 1, lambda text: None, lambda: False)
    ssh = tmp_path / "bin" / "ssh"
    # The first connection ends with ssh's own status.
    broken = f'if mkdir {tmp_path}/broken; then {ssh}.real "$@"; exit 255; fi; exec {ssh}.real "$@"'
    ssh.rename(f"{ssh}.real")
    ssh.write_text(f"#!/bin/bash\n{broken}\n")
    ssh.chmod(0o755)
    (command,) = slices.commands(job, 1)
    process = subprocess.Popen(
        command.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith('[["-u", "-m"')
    assert process.wait(60) == 1
    assert process.stdout.read() == ""
    assert "the process was started, but the connection broke" in process.stderr.read()
