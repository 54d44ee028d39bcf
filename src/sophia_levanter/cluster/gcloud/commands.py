"""Command lines for gcloud and for shells on TPU hosts, and the results of gcloud commands for queued resources."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_levanter.cluster.config import GcloudCluster
from sophia_levanter.errors import InputError

_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
# Close a connection after a minute without a response from the other end.
_KEEPALIVE = ("--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oServerAliveCountMax=4")


def resource_name(cluster: GcloudCluster, run_dir: Path) -> str:
    """Return the queued resource's name from the cluster file, or derive a name from the path of the run directory.

    Raises:
        InputError: if the cluster file has no name and none can be derived.
    """
    if cluster.name is not None:
        return cluster.name
    made = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).lstrip("-0123456789")[:33].rstrip("-")
    if not made:
        raise InputError(
            f"name is missing and cannot be derived from {run_dir.name!r}; specify a name for the queued resource"
        )
    # The hash distinguishes run directories with the same name.
    return f"{made}-{hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:6]}"


@dataclass(frozen=True)
class GcloudCommands:
    """Command lines for one queued resource, its nodes (one per slice) and their workers.

    Attributes:
        cluster: the cluster settings.
        name: the name of the queued resource.
    """

    cluster: GcloudCluster
    name: str

    @property
    def node_names(self) -> list[str]:
        """The names of the slices."""
        return [self.name] if self.cluster.slices == 1 else [f"{self.name}-{i}" for i in range(self.cluster.slices)]

    @property
    def config_file(self) -> str:
        """The path of the run's configuration on the hosts, relative to the home directory."""
        return f"sophia_levanter-{self.name}.yaml"

    @property
    def log_folder(self) -> str:
        """The folder for the logs of attempts on each host, relative to the home directory."""
        return f"sophia_levanter-{self.name}-logs"

    def create(self) -> list[str]:
        cluster, shape = self.cluster, self.cluster.shape
        one = [f"--node-id={self.name}"]
        several = [f"--node-count={cluster.slices}", f"--node-prefix={self.name}"]
        words = [
            *(*_QUEUED, "create", self.name),
            *(one if cluster.slices == 1 else several),
            f"--accelerator-type={shape.accelerator_type}",
            f"--runtime-version={cluster.runtime_version or shape.runtime_version}",
        ]
        if cluster.capacity != "on-demand":
            words.append(f"--{cluster.capacity}")
        for flag in ("network", "subnetwork", "service_account"):
            if value := getattr(cluster, flag):
                words.append(f"--{flag.replace('_', '-')}={value}")
        if cluster.internal_ips:
            words.append("--internal-ips")
        return [*words, *self._place, "--async", "--quiet"]

    def describe(self) -> list[str]:
        return [*_QUEUED, "describe", self.name, *self._place, "--format=json", "--quiet"]

    def list_all(self) -> list[str]:
        """Return the command that lists all queued resources in the zone."""
        return [*_QUEUED, "list", *self._place]

    def delete(self) -> list[str]:
        # --force also deletes the nodes.
        return [*_QUEUED, "delete", self.name, *self._place, "--force", "--async", "--quiet"]

    def describe_node(self, node: str) -> list[str]:
        return [*self._tpu_vm, "describe", node, *self._place, "--format=json", "--quiet"]

    def ssh(self, node: str, worker: int | str, command: str) -> list[str]:
        """Return a command that runs `command` on one worker or `all`. With one, stdin and status are forwarded."""
        to = [node, *self._place, f"--worker={worker}", *self._tunnel, *_KEEPALIVE, "--quiet"]
        return [*self._tpu_vm, "ssh", *to, f"--command={command}"]

    def scp(self, node: str, files: Sequence[str], destination: str) -> list[str]:
        """Return the command that copies files to all workers."""
        to = [f"{node}:{destination}", *self._place, "--worker=all", *self._tunnel, "--quiet"]
        return [*self._tpu_vm, "scp", *files, *to]

    def setup(self) -> str:
        """Return a shell command that runs the cluster's `setup` once on each host."""
        lines = "\n".join(self.cluster.setup)
        digest = hashlib.sha256(lines.encode())
        for path in map(Path, self.cluster.files):
            digest.update(path.read_bytes() if path.is_file() else b"")
        marker = f"sophia_levanter-setup-{digest.hexdigest()[:12]}"
        return f"test -e {marker} || {{ bash -e -o pipefail -c {shlex.quote(lines)} && touch {marker}; }}"

    def training(self, words: Sequence[str], env: Mapping[str, str], log: str) -> str:
        """Return a shell command that runs a training process on a host.

        Args:
            words: the process's command line.
            env: environment variables to add to those in the cluster settings.
            log: name of the log file, which must differ between attempts.
        """
        cluster = self.cluster
        of_project = f" --project={cluster.project}" if cluster.project else ""
        # Use two commands per secret, because `export NAME="$(...)"` returns the status of export.
        parts = [
            f'{name}="$(gcloud secrets versions access latest --secret={name}{of_project})" || exit 1; export {name}'
            for name in cluster.secrets
        ]
        parts += [f"export {name}={shlex.quote(value)}" for name, value in {**cluster.env, **env}.items()]
        host = [cluster.python, "-m", "sophia_levanter.cluster.host", "--grace", str(cluster.stop_timeout)]
        host += ["--log", f"{self.log_folder}/{log}", "--", *words]
        return "; ".join([*parts, f"exec {shlex.join(host)}"])

    def newest_log(self) -> str:
        """Return a shell command that follows the log of the most recent attempt on a host."""
        return f'tail -n 100 -F "$(ls -d {self.log_folder}/*.log | tail -n 1)"'

    @property
    def _place(self) -> list[str]:
        project = [f"--project={self.cluster.project}"] if self.cluster.project else []
        return [f"--zone={self.cluster.zone}", *project]

    @property
    def _tpu_vm(self) -> list[str]:
        # Only the alpha command supports tunnels.
        return ["gcloud", *(["alpha"] if self.cluster.internal_ips else []), "compute", "tpus", "tpu-vm"]

    @property
    def _tunnel(self) -> list[str]:
        return ["--tunnel-through-iap"] if self.cluster.internal_ips else []


# The number of trailing lines shown in an error message.
_TAIL_LINES = 15
# Errors that only the user can correct. Others, such as an unreachable name server, may be temporary.
_FINAL = ("INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND", "FAILED_PRECONDITION")
_USAGE = 2  # gcloud's exit status for an invalid command line
_SSH_FAILED = 255  # exit status of ssh itself
# Nodes in these states have lost their hosts or will lose them.
_LOST = ("PREEMPTED", "TERMINATED", "DELETING", "STOPPED", "STOPPING", "REPAIRING", "HIDDEN", "HIDING", "UNKNOWN")
_GONE = "gone"
_NO_ACCOUNT = "gcloud auth login"  # part of gcloud's error message if no account is logged in


def never() -> bool:
    """Return False, so that waiting never stops. This is the default of `stopped`."""
    return False


class Stopped(Exception):
    """The launcher was asked to stop while gcloud was running."""


class Refused(Exception):
    """A request failed but may succeed later; the message is gcloud's error."""


@dataclass(frozen=True)
class Answer:
    """The result of a gcloud command.

    Attributes:
        status: the exit status.
        output: the standard output.
        errors: the standard error.
    """

    status: int
    output: str
    errors: str

    @property
    def error(self) -> str:
        """The first line of gcloud's error message, without the command name."""
        match = re.search(r"^ERROR: (?:\(gcloud[\w.-]*\) )?(.+)", self.errors, re.MULTILINE)
        return match[1].strip() if match else ((self.errors.strip().splitlines() or [""])[-1])

    @property
    def code(self) -> str | None:
        """Google's error code, such as NOT_FOUND."""
        match = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", self.error)
        return match[1] if match else None

    @property
    def final(self) -> bool:
        """Whether retrying the command cannot help."""
        return self.code in _FINAL or self.status == _USAGE or _NO_ACCOUNT in self.errors

    @property
    def unreachable(self) -> bool:
        """Whether the command failed to reach its host, as opposed to failing on the host."""
        return self.status == _SSH_FAILED or "ERROR: (gcloud" in self.errors or "gcloud crashed" in self.errors

    @property
    def tail(self) -> str:
        """The last lines of standard output and standard error."""
        lines = [line.rstrip() for line in f"{self.output}\n{self.errors}".splitlines() if line.strip()]
        return "\n".join(lines[-_TAIL_LINES:])

    def json(self) -> dict[str, Any]:
        return json.loads(self.output)


def call(words: Sequence[str], stopped: Callable[[], bool] = never) -> Answer:
    """Run gcloud and wait until it exits.

    Args:
        words: the command line.
        stopped: function that returns whether to stop waiting.

    Raises:
        InputError: if gcloud is not installed.
        Stopped: if `stopped` returns true, in which case gcloud is killed.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise InputError(missing_gcloud()) from None
    try:
        while True:
            try:
                output, errors = process.communicate(timeout=0.2)
                return Answer(process.returncode, output, errors)
            except subprocess.TimeoutExpired:
                if stopped():
                    raise Stopped from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def missing_gcloud() -> str:
    """Return the error message for a missing gcloud command."""
    return "backend gcloud: the gcloud command was not found; install it from https://cloud.google.com/sdk/docs/install"


@dataclass(frozen=True)
class Node:
    """A TPU slice.

    Attributes:
        name: the node's name in gcloud.
        state: READY if it can be used.
        health: HEALTHY if it can be used; None if unknown.
        addresses: internal addresses of the hosts, in the order of the workers.
    """

    name: str
    state: str
    health: str | None = None
    addresses: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether the slice has lost a host and can never be complete again."""
        return self.state in (*_LOST, _GONE)

    @property
    def whole(self) -> bool:
        """Whether the slice can be used."""
        return self.state == "READY" and self.health in (None, "HEALTHY", "HEALTH_UNSPECIFIED")

    def __str__(self) -> str:
        health = f" and {self.health}" if self.state == "READY" and self.health else ""
        return f"slice {self.name} is {self.state}{health}"


class QueuedResource:
    """The queued resource for a run's slices. All methods raise `Stopped` if `stopped` returns true.

    Attributes:
        commands: the command lines for the resource.
        ours: whether the resource with this name has the requested slices or was requested by this object.
    """

    def __init__(self, commands: GcloudCommands) -> None:
        self.commands = commands
        self.ours = False

    def state(self, stopped: Callable[[], bool] = never) -> tuple[str, str] | None:
        """Query the resource's state and error message. Return None if the resource does not exist.

        Raises:
            InputError: if the resource with this name has different slices, or Google rejects the query permanently.
            Refused: if the query fails but may succeed later.
        """
        answer = call(self.commands.describe(), stopped)
        if answer.code == "NOT_FOUND":
            return None
        self._check(answer)
        described = answer.json()
        self.ours = False
        self._check_specification(described)
        self.ours = True
        state = described.get("state", {})
        said = state.get("failedData", {}).get("error", {}).get("message", "")
        return state.get("state", "STATE_UNSPECIFIED"), said

    def create(self, stopped: Callable[[], bool] = never) -> bool:
        """Request the resource and return whether it is new.

        Raises:
            InputError: if Google rejects the request permanently.
            Refused: if the request fails but may succeed later.
        """
        self.ours = True  # set before the request, because the answer may be lost
        answer = call(self.commands.create(), stopped)
        self.ours = not (answer.status and answer.final)
        if answer.code == "ALREADY_EXISTS":
            return False
        self._check(answer)
        return True

    def delete(self, stopped: Callable[[], bool] = never) -> Answer:
        """Request the deletion of the resource and its slices."""
        return call(self.commands.delete(), stopped)

    def nodes(self, stopped: Callable[[], bool] = never) -> list[Node]:
        """Query the slices.

        Raises:
            Refused: if a query fails.
        """
        found = []
        for name in self.commands.node_names:
            answer = call(self.commands.describe_node(name), stopped)
            if answer.code == "NOT_FOUND":
                found.append(Node(name, _GONE))
            elif answer.status:
                raise Refused(answer.error)
            else:
                described = answer.json()
                addresses = tuple(end.get("ipAddress", "") for end in described.get("networkEndpoints", ()))
                found.append(Node(name, described.get("state", "UNKNOWN"), described.get("health"), addresses))
        return found

    def _check(self, answer: Answer) -> None:
        if answer.status and answer.final:
            raise InputError(f"backend gcloud: queued resource {self.commands.name}: {answer.error}")
        if answer.status:
            raise Refused(answer.error)

    def _check_specification(self, described: dict[str, Any]) -> None:
        specs = described.get("tpu", {}).get("nodeSpec", [{}])
        count = specs[0].get("multisliceParams", {}).get("nodeCount", 1)
        accelerator = specs[0].get("node", {}).get("acceleratorType", "?").rpartition("/")[2]
        cluster = self.commands.cluster
        if (accelerator, count) != (cluster.shape.accelerator_type, cluster.slices):
            raise InputError(
                f"name {self.commands.name}: a queued resource with this name exists with {count} x {accelerator}, but "
                f"{cluster.slices} x {cluster.shape.accelerator_type} was requested; delete it or choose another name"
            )
