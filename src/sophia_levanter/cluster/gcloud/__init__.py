"""The gcloud backend: Google Cloud TPU slices from one queued resource, with one training process per host."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sophia_levanter.cluster.backend import Backend, HostCommand, Job, Say, Unavailable, training_command
from sophia_levanter.cluster.config import GcloudCluster
from sophia_levanter.cluster.gcloud.commands import (
    Answer,
    GcloudCommands,
    Node,
    QueuedResource,
    Refused,
    Stopped,
    call,
    resource_name,
)
from sophia_levanter.config.build import MASK
from sophia_levanter.errors import InputError

PRICES = "https://cloud.google.com/tpu/pricing"
# Pauses between deletion requests while Google refuses them, and then between checks that the deletion has begun, in
# units of `poll`: about seven minutes each in total.
RELEASE_PAUSES = (1, 2, 4, 8, 12)
LONGEST_PAUSE = 300.0  # seconds before a refused request is retried
SETTLE = 600.0  # seconds for the nodes of an active queued resource to become healthy, or for its deletion to begin
_OVER = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
# These ports are below the kernel's ephemeral ports and are not used by TPU software. Each attempt uses a different
# port, because the port of the previous attempt may still be in use.
_COORDINATOR_PORT, _SLICES_PORT, _PORTS = 20000, 21000, 1000


class GcloudBackend(Backend):
    """Starts processes on the slices of one queued resource.

    Attributes:
        num_processes: number of processes in the run, one per host.
    """

    def __init__(self, cluster: GcloudCluster, run_dir: Path, *, poll: float = 15.0) -> None:
        """Set up the backend without starting anything.

        Args:
            cluster: the cluster settings.
            run_dir: the run directory. The queued resource is named after it unless the cluster file specifies a name.
            poll: seconds between polls.

        Raises:
            InputError: if the name of the queued resource is missing and cannot be derived.
        """
        self.num_processes = cluster.num_processes
        self._cluster = cluster
        self._commands = GcloudCommands(cluster, resource_name(cluster, run_dir))
        self._resource = QueuedResource(self._commands)
        self._poll = poll
        self._nodes: list[Node] = []

    def describe(self, job: Job) -> list[str]:
        shape, cluster = self._cluster.shape, self._cluster
        lines = [
            f"would create queued resource {self._commands.name} in {cluster.zone}, unless it already exists:",
            f"  {shlex.join(self._commands.create())}",
            f"billed: {cluster.slices} x {shape}; {cluster.capacity}, {cluster.slices * shape.chips} chips in total, "
            f"from activation to deletion, at the prices on {PRICES}",
            "would then copy the configuration and files to every host:",
            *(f"  {shlex.join(words)}" for words in self._copies(job)),
        ]
        if cluster.setup:
            lines.append("would run the setup commands once on every host:")
            lines += [f"  {shlex.join(words)}" for words in self._setups()]
        lines.append("would run for each attempt (WORKER_0: internal address of worker 0 in the first slice):")
        stand_ins = [Node(name, "READY", None, ("WORKER_0",) * shape.hosts) for name in self._commands.node_names]
        masked = dataclasses.replace(cluster, env=dict.fromkeys(cluster.env, MASK))
        shown = GcloudCommands(masked, self._commands.name)
        lines += [f"  {command.shown()}" for command in self._host_commands(shown, stand_ins, 1, "ATTEMPT")]
        kept = "would keep the queued resource, which is billed until you delete it:"
        lines.append(kept if cluster.keep else "would delete the queued resource when the run is done:")
        return [*lines, f"  {shlex.join(self._commands.delete())}"]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Obtain complete slices, copy the configuration and files to every host, and run `setup` there.

        Raises:
            InputError: if the slices cannot be obtained or a `setup` command fails.
            Unavailable: if the slices are not available within `start_timeout`, or cannot be reached.
        """
        self._nodes = []
        self._cluster.check_files()
        try:
            nodes = Acquisition(self._resource, self._poll, say, stopped).run()
            say(f"queued resource {self._commands.name}: {self._cluster.slices} x {self._cluster.shape} ready")
            # Copy one at a time, because the first call creates gcloud's ssh key if it is missing.
            for words in self._copies(job):
                self._check(call(words, stopped), "copying files")
            if self._cluster.setup:
                with ThreadPoolExecutor(len(nodes)) as pool:
                    answers = list(pool.map(lambda words: call(words, stopped), self._setups()))
                for answer in answers:
                    self._check(answer, "setup")
        except Stopped:
            return
        self._nodes = nodes

    def commands(self, job: Job, attempt: int) -> list[HostCommand]:
        """Return the commands for an attempt: one ssh connection per host."""
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        return self._host_commands(self._commands, self._nodes, attempt, stamp)

    def was_preempted(self) -> bool:
        """Return whether any of the slices have been lost."""
        try:
            state = self._resource.state()
            if state is None or state[0] != "ACTIVE":
                return True
            return any(node.lost for node in self._resource.nodes())
        except (InputError, Refused):
            return False

    def release(self, say: Say) -> None:
        """Delete the queued resource and its slices, unless `keep` is set."""
        if not self._resource.ours:
            return
        name, by_hand = self._commands.name, shlex.join(self._commands.delete())
        if self._cluster.keep:
            say(f"queued resource {name} is kept and will be billed until you delete it: {by_hand}")
            return
        answer = self._resource.delete()
        for pause in RELEASE_PAUSES:
            if not answer.status or answer.final:
                break
            say(f"gcloud: {answer.error}; retrying, because the slices are billed")
            time.sleep(pause * self._poll)
            answer = self._resource.delete()
        if answer.code == "NOT_FOUND":
            say(f"queued resource {name} no longer exists")
        elif answer.status:
            say(f"queued resource {name} could not be deleted and is still billed: {answer.error}; try {by_hand}")
        elif any(self._is_being_deleted(pause) for pause in RELEASE_PAUSES):
            say(f"queued resource {name} is being deleted")
        else:
            say(f"queued resource {name} may still be billed: its accepted deletion did not begin; try {by_hand}")

    def _is_being_deleted(self, pause: int) -> bool:
        """Return whether a deletion has begun. Google may accept a deletion and then fail to carry it out."""
        time.sleep(pause * self._poll)
        try:
            state = self._resource.state()
        except (InputError, Refused):
            return False
        return state is None or state[0] in ("SUSPENDING", "DELETING")

    def _host_commands(self, to: GcloudCommands, nodes: Sequence[Node], attempt: int, stamp: str) -> list[HostCommand]:
        hosts = [(i, node, worker) for i, node in enumerate(nodes) for worker in range(len(node.addresses))]
        commands = []
        for process_id, (slice_id, node, worker) in enumerate(hosts):
            coordinator = nodes[0].addresses[0]
            mesh = {
                "coordinator": f"{coordinator}:{_COORDINATOR_PORT + attempt % _PORTS}",
                "num_processes": self.num_processes,
                "process_id": process_id,
            }
            env = {}
            if len(nodes) > 1:
                port = _SLICES_PORT + attempt % _PORTS
                env = {
                    "MEGASCALE_COORDINATOR_ADDRESS": f"{coordinator}:{port}",
                    "MEGASCALE_PORT": str(port),
                    "MEGASCALE_NUM_SLICES": str(len(nodes)),
                    "MEGASCALE_SLICE_ID": str(slice_id),
                }
            words = training_command(to.cluster.python, to.config_file, mesh if self.num_processes > 1 else None)
            line = to.training(words, env, f"{stamp}-attempt-{attempt}.log")
            commands.append(HostCommand(f"process-{process_id}", to.ssh(node.name, worker, line), by_stdin=True))
        return commands

    def _copies(self, job: Job) -> list[list[str]]:
        # gcloud interprets the text before a colon as a host unless that text contains a slash.
        files = [os.path.abspath(file) for file in self._cluster.files]
        commands, config = self._commands, os.path.abspath(job.config_file)
        copies = [commands.scp(node, [config], commands.config_file) for node in commands.node_names]
        return copies + [commands.scp(node, files, "") for node in commands.node_names if files]

    def _setups(self) -> list[list[str]]:
        return [self._commands.ssh(node, "all", self._commands.setup()) for node in self._commands.node_names]

    def _check(self, answer: Answer, what: str) -> None:
        if not answer.status:
            return
        text = f"{what} failed with status {answer.status} on queued resource {self._commands.name}:\n{answer.tail}"
        raise Unavailable(text) if answer.unreachable else InputError(text)


class Acquisition:
    """Waits for complete slices, and creates them if necessary.

    Args:
        resource: the queued resource.
        poll: seconds between polls.
        say: function that prints a message.
        stopped: function that returns whether the launcher was asked to stop.
    """

    def __init__(self, resource: QueuedResource, poll: float, say: Say, stopped: Callable[[], bool]) -> None:
        self._resource = resource
        self._poll = poll
        self._tell = say
        self._stopped = stopped
        self._name = resource.commands.name
        self._pause = poll
        self._said = ""
        self._deleting_since: float | None = None
        self._active_since: float | None = None

    def run(self) -> list[Node]:
        """Wait for the slices and return them.

        Raises:
            InputError: if the slices cannot be obtained.
            Unavailable: if the slices are not available in time.
            Stopped: if `stopped` returns true.
        """
        timeout = self._resource.commands.cluster.start_timeout
        deadline = time.monotonic() + timeout
        while True:
            if self._stopped():
                raise Stopped
            try:
                if nodes := self._look():
                    return nodes
            except Refused as refusal:
                self._say(f"gcloud: {refusal}; retrying")
                self._back_off()
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"no slices became available within {timeout} s (start_timeout); last state: {self._said}"
                )

    def _look(self) -> list[Node] | None:
        """Take one step toward obtaining the slices, and return them if they are complete."""
        state = self._resource.state(self._stopped)
        if state is None:
            self._deleting_since = self._active_since = None
            self._create()
        elif state[0] in _OVER or self._deleting_since is not None:
            self._replace(f"queued resource {self._name} is {': '.join(filter(None, state))}", state[0])
        elif state[0] != "ACTIVE":
            self._say(f"queued resource {self._name} is {state[0]}")
            self._sleep(self._poll)
        else:
            return self._whole_nodes()
        return None

    def _create(self) -> None:
        if self._resource.create(self._stopped):
            self._say(f"created queued resource {self._name}; it is billed from activation to deletion")
        else:
            self._say(f"queued resource {self._name} already exists")

    def _whole_nodes(self) -> list[Node] | None:
        nodes = self._resource.nodes(self._stopped)
        now = time.monotonic()
        self._active_since = self._active_since or now
        faults = "; ".join(str(node) for node in nodes if not node.whole)
        if not faults:
            self._check_hosts(nodes)
            return nodes
        if any(node.lost for node in nodes) or now - self._active_since > SETTLE:
            self._replace(faults, "ACTIVE")
        else:
            self._say(faults)
            self._sleep(self._poll)
        return None

    def _check_hosts(self, nodes: list[Node]) -> None:
        hosts = self._resource.commands.cluster.shape.hosts
        for node in nodes:
            if len(node.addresses) != hosts:
                accelerator = self._resource.commands.cluster.shape.accelerator_type
                raise InputError(
                    f"slice {node.name} has {len(node.addresses)} hosts, but {accelerator} should have {hosts}"
                )

    def _replace(self, why: str, state: str) -> None:
        # Google may accept a deletion and then fail to carry it out.
        expired = self._deleting_since is None or time.monotonic() - self._deleting_since > SETTLE
        if state == "DELETING" or not expired:
            self._say(f"{why}; waiting until it is deleted")
            self._sleep(self._poll)
            return
        self._say(f"{why}; deleting and recreating it")
        answer = self._resource.delete(self._stopped)
        if answer.status and answer.code != "NOT_FOUND":
            raise Refused(answer.error)
        self._deleting_since = time.monotonic()
        # The pause grows, so that a resource is not recreated in a tight loop if it fails immediately.
        self._back_off()

    def _back_off(self) -> None:
        self._sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._tell(text)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopped() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
