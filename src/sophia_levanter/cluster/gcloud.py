"""The gcloud backend: TPU slices of Google Cloud, bought as a queued resource, a training process on each host."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sophia_levanter.cluster.backend import HostCommand, Job, Say, Unavailable, training_command
from sophia_levanter.cluster.config import GcloudCluster
from sophia_levanter.cluster.gcloud_calls import Answer, Stopped, call
from sophia_levanter.cluster.gcloud_words import GcloudWords, resource_name
from sophia_levanter.cluster.queued_resources import Node, QueuedResource
from sophia_levanter.config.build import MASK
from sophia_levanter.errors import InputError

PRICES = "https://cloud.google.com/tpu/pricing"
# In polls, while Google refuses to delete: some seven minutes in all.
RELEASE_PAUSES = (1, 2, 4, 8, 12)
# Below the ports that the kernel gives away, and none that a TPU's own software listens on. Another one for each
# attempt, since a port of the one before may still be taken.
_COORDINATOR_PORT, _SLICES_PORT, _PORTS = 20000, 21000, 1000


class GcloudBackend:
    """Slices of one queued resource.

    Attributes:
        num_processes: that the run has, one a host.
    """

    def __init__(self, cluster: GcloudCluster, run_dir: Path, *, poll: float = 15.0) -> None:
        """Starts nothing.

        Args:
            cluster: what is asked for.
            run_dir: of the run, which the queued resource is named after if the cluster's file does not name it.
            poll: seconds between two looks at what is waited for.

        Raises:
            InputError: if there is no name for the queued resource.
        """
        self.num_processes = cluster.num_processes
        self._cluster = cluster
        self._words = GcloudWords(cluster, resource_name(cluster, run_dir))
        self._resource = QueuedResource(self._words, poll)
        self._poll = poll
        self._nodes: list[Node] = []

    def describe(self, job: Job) -> list[str]:
        """What would be created, run and paid for, as lines for people. Nothing is started."""
        shape, cluster = self._cluster.shape, self._cluster
        lines = [
            f"would create, unless it is there already, queued resource {self._words.name} in {cluster.zone}:",
            f"  {shlex.join(self._words.create())}",
            f"paid for: {cluster.slices} x {shape}; {cluster.capacity}, {cluster.slices * shape.chips} chips in all, "
            f"from when it is active until it is deleted, by the prices at {PRICES}",
            "would then copy the configuration, and files, to every host:",
            *(f"  {shlex.join(words)}" for words in self._copies(job)),
        ]
        if cluster.setup:
            lines.append("would run the lines of setup once on every host:")
            lines += [f"  {shlex.join(words)}" for words in self._setups()]
        lines.append("would run for each attempt (WORKER_0: the internal address of worker 0 of the first slice):")
        stand_ins = [Node(name, "READY", None, ("WORKER_0",) * shape.hosts) for name in self._words.node_names]
        masked = dataclasses.replace(cluster, env=dict.fromkeys(cluster.env, MASK))
        words = GcloudWords(masked, self._words.name)
        lines += [f"  {command.shown()}" for command in self._host_commands(words, stand_ins, 1, "ATTEMPT")]
        kept = "would keep it, and it would be paid for, until somebody deletes it:"
        lines.append(kept if cluster.keep else "would delete it when the run is over:")
        return [*lines, f"  {shlex.join(self._words.delete())}"]

    def prepare(self, job: Job, attempt: int, say: Say, stopped: Callable[[], bool]) -> None:
        """Have whole slices, with the configuration and what `setup` installs on every host.

        Raises:
            InputError: if they cannot be had, or a line of `setup` fails.
            Unavailable: if they do not come within `start_timeout`, or cannot be reached.
        """
        self._nodes = []
        for file in self._cluster.files:
            if not Path(file).is_file():
                raise InputError(f"files names {file}, which is not there")
        try:
            nodes = self._resource.acquire(say, stopped)
            say(f"queued resource {self._words.name}: {self._cluster.slices} x {self._cluster.shape} ready")
            # One after another: the first one makes gcloud's ssh key where there is none.
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
        """What to start for an attempt: an ssh to each host."""
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        return self._host_commands(self._words, self._nodes, attempt, stamp)

    def was_preempted(self) -> bool:
        """Whether the slices are no longer there."""

        def never() -> bool:
            return False

        try:
            state = self._resource.state(never)
            if state is None:
                return True
            if isinstance(state, Answer):
                return False
            if state[0] != "ACTIVE":
                return True
            nodes = self._resource.nodes(never)
        except InputError:
            return False
        return not isinstance(nodes, Answer) and any(node.lost for node in nodes)

    def release(self, say: Say) -> None:
        """Deletes the queued resource with its slices, if `keep` is not set."""
        if not self._resource.ours:
            return
        by_hand = shlex.join(self._words.delete())
        if self._cluster.keep:
            say(f"queued resource {self._words.name} stays, and is paid for until you delete it: {by_hand}")
            return
        answer = self._resource.delete(lambda: False)
        for pause in RELEASE_PAUSES:
            if not answer.status or answer.final:
                break
            say(f"gcloud: {answer.error}; trying again, for the slices are paid for")
            time.sleep(pause * self._poll)
            answer = self._resource.delete(lambda: False)
        if answer.code == "NOT_FOUND":
            say(f"queued resource {self._words.name} is gone")
        elif answer.status:
            say(f"queued resource {self._words.name} is not deleted, and still paid for: {answer.error}; try {by_hand}")
        else:
            say(f"queued resource {self._words.name} is being deleted")

    def _host_commands(self, to: GcloudWords, nodes: Sequence[Node], attempt: int, stamp: str) -> list[HostCommand]:
        hosts = [(i, node, worker) for i, node in enumerate(nodes) for worker in range(len(node.addresses))]
        return [
            HostCommand(
                label=f"process-{number}",
                words=to.ssh(node.name, worker, self._training(to, nodes, slice_id, number, attempt, stamp)),
                by_stdin=True,
            )
            for number, (slice_id, node, worker) in enumerate(hosts)
        ]

    def _training(
        self, to: GcloudWords, nodes: Sequence[Node], slice_id: int, process_id: int, attempt: int, stamp: str
    ) -> str:
        first = nodes[0].addresses[0]
        mesh = {
            "coordinator": f"{first}:{_COORDINATOR_PORT + attempt % _PORTS}",
            "num_processes": self.num_processes,
            "process_id": process_id,
        }
        env = {}
        if len(nodes) > 1:
            port = _SLICES_PORT + attempt % _PORTS
            env = {
                "MEGASCALE_COORDINATOR_ADDRESS": f"{first}:{port}",
                "MEGASCALE_PORT": str(port),
                "MEGASCALE_NUM_SLICES": str(len(nodes)),
                "MEGASCALE_SLICE_ID": str(slice_id),
            }
        words = training_command(
            self._cluster.python, self._words.config_file, mesh if self.num_processes > 1 else None
        )
        return to.training(words, env, f"{stamp}-attempt-{attempt}.log")

    def _copies(self, job: Job) -> list[list[str]]:
        # gcloud takes what comes before a colon for a host, if there is no slash before it.
        files = [os.path.abspath(file) for file in self._cluster.files]
        words, config = self._words, os.path.abspath(job.config_file)
        copies = [words.scp(node, [config], words.config_file) for node in words.node_names]
        return copies + [words.scp(node, files, "") for node in words.node_names if files]

    def _setups(self) -> list[list[str]]:
        return [self._words.ssh(node, "all", self._words.setup()) for node in self._words.node_names]

    def _check(self, answer: Answer, what: str) -> None:
        if not answer.status:
            return
        text = f"{what} failed with status {answer.status} on queued resource {self._words.name}:\n{answer.tail}"
        raise Unavailable(text) if answer.unreachable else InputError(text)
