"""A queued resource: asked for, waited for, and replaced where it has lost a host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sophia_levanter.cluster.backend import Say, Unavailable
from sophia_levanter.cluster.gcloud_calls import Answer, Stopped, call
from sophia_levanter.cluster.gcloud_words import GcloudWords
from sophia_levanter.errors import InputError

LONGEST_PAUSE = 300.0  # seconds between two tries of what was refused
SETTLE = 600.0  # seconds that the nodes of an active queued resource have to be ready and healthy
_DELETING = "DELETING"
_OVER = ("FAILED", "SUSPENDING", "SUSPENDED", _DELETING)
# Nodes of these states have lost their hosts, or will.
_LOST = ("PREEMPTED", "TERMINATED", "DELETING", "STOPPED", "STOPPING", "REPAIRING", "HIDDEN", "HIDING", "UNKNOWN")
_GONE = "gone"


@dataclass(frozen=True)
class Node:
    """A slice.

    Attributes:
        name: by which gcloud knows it.
        state: READY where it can be used.
        health: HEALTHY, if that is known.
        addresses: internal ones of its hosts, in the order of the workers.
    """

    name: str
    state: str
    health: str | None = None
    addresses: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether it has lost a host and will never be whole again."""
        return self.state in (*_LOST, _GONE)

    @property
    def whole(self) -> bool:
        """Whether it can be used."""
        return self.state == "READY" and self.health in (None, "HEALTHY", "HEALTH_UNSPECIFIED")

    def __str__(self) -> str:
        health = f" and {self.health}" if self.state == "READY" and self.health else ""
        return f"slice {self.name} is {self.state}{health}"


class QueuedResource:
    """The one that a run has its slices from.

    Attributes:
        words: command lines for it.
        ours: whether what is there under its name is what was asked for, or was asked for by this object.
    """

    def __init__(self, words: GcloudWords, poll: float) -> None:
        self.words = words
        self.ours = False
        self._poll = poll

    def acquire(self, say: Say, stopped: Callable[[], bool]) -> list[Node]:
        """Waits for whole slices, after creating them where needed.

        Raises:
            InputError: if they cannot be had.
            Unavailable: if they do not come in time.
            Stopped: if `stopped` says so.
        """
        return _Acquisition(self, self._poll, say, stopped).run()

    def state(self, stopped: Callable[[], bool]) -> tuple[str, str] | Answer | None:
        """Its state with what is said of it, None if there is no such queued resource, or an error.

        Raises:
            InputError: if there is another one of that name, or it may not be asked for.
        """
        answer = call(self.words.describe(), stopped)
        if answer.code == "NOT_FOUND":
            return None
        if answer.status:
            self._check(answer)
            return answer
        described = answer.json()
        self.ours = False
        self._check_specification(described)
        self.ours = True
        state = described.get("state", {})
        said = state.get("failedData", {}).get("error", {}).get("message", "")
        return state.get("state", "STATE_UNSPECIFIED"), said

    def create(self, stopped: Callable[[], bool]) -> Answer:
        """Asks for it.

        Raises:
            InputError: if it cannot be had.
        """
        self.ours = True  # before the answer, which may get lost
        answer = call(self.words.create(), stopped)
        self.ours = not (answer.status and answer.final)
        self._check(answer)
        return answer

    def delete(self, stopped: Callable[[], bool]) -> Answer:
        """Asks for its end, and that of its slices."""
        return call(self.words.delete(), stopped)

    def nodes(self, stopped: Callable[[], bool]) -> list[Node] | Answer:
        """The slices, or an error."""
        found = []
        for name in self.words.node_names:
            answer = call(self.words.describe_node(name), stopped)
            if answer.code == "NOT_FOUND":
                found.append(Node(name, _GONE))
            elif answer.status:
                return answer
            else:
                described = answer.json()
                addresses = tuple(end.get("ipAddress", "") for end in described.get("networkEndpoints", ()))
                found.append(Node(name, described.get("state", "UNKNOWN"), described.get("health"), addresses))
        return found

    def _check(self, answer: Answer) -> None:
        if answer.status and answer.final:
            raise InputError(f"backend gcloud: queued resource {self.words.name}: {answer.error}")

    def _check_specification(self, described: dict[str, Any]) -> None:
        specs = described.get("tpu", {}).get("nodeSpec", [{}])
        count = specs[0].get("multisliceParams", {}).get("nodeCount", 1)
        accelerator = specs[0].get("node", {}).get("acceleratorType", "?").rpartition("/")[2]
        cluster = self.words.cluster
        if (accelerator, count) != (cluster.shape.accelerator_type, cluster.slices):
            raise InputError(
                f"name {self.words.name}: there is a queued resource of that name with {count} x {accelerator}, and "
                f"{cluster.slices} x {cluster.shape.accelerator_type} are asked for; delete it, or give another name"
            )


class _Acquisition:
    """One wait for whole slices."""

    def __init__(self, resource: QueuedResource, poll: float, say: Say, stopped: Callable[[], bool]) -> None:
        self._resource = resource
        self._poll = poll
        self._tell = say
        self._stopped = stopped
        self._name = resource.words.name
        self._pause = poll
        self._said = ""
        self._deleting = False
        self._active_since: float | None = None

    def run(self) -> list[Node]:
        timeout = self._resource.words.cluster.start_timeout
        deadline = time.monotonic() + timeout
        while True:
            if self._stopped():
                raise Stopped
            if nodes := self._look():
                return nodes
            if time.monotonic() >= deadline:
                raise Unavailable(f"no slices within start_timeout, {timeout} seconds; at last {self._said}")

    def _look(self) -> list[Node] | None:
        """Takes one step towards slices; returns them where they are whole."""
        state = self._resource.state(self._stopped)
        if isinstance(state, Answer):
            self._refused(state)
        elif state is None:
            self._deleting, self._active_since = False, None
            self._create()
        elif state[0] in _OVER or self._deleting:
            self._replace(f"queued resource {self._name} is {': '.join(filter(None, state))}", state[0])
        elif state[0] != "ACTIVE":
            self._say(f"queued resource {self._name} is {state[0]}")
            self._sleep(self._poll)
        else:
            return self._whole_nodes()
        return None

    def _create(self) -> None:
        answer = self._resource.create(self._stopped)
        if answer.code == "ALREADY_EXISTS":
            self._say(f"queued resource {self._name} is there already")
        elif answer.status:
            self._refused(answer)
        else:
            self._say(
                f"created queued resource {self._name}; it is paid for from when it is active until it is deleted"
            )

    def _whole_nodes(self) -> list[Node] | None:
        nodes = self._resource.nodes(self._stopped)
        if isinstance(nodes, Answer):
            self._refused(nodes)
            return None
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
        hosts = self._resource.words.cluster.shape.hosts
        for node in nodes:
            if len(node.addresses) != hosts:
                accelerator = self._resource.words.cluster.shape.accelerator_type
                raise InputError(
                    f"slice {node.name} has {len(node.addresses)} hosts, and {accelerator} should have {hosts}"
                )

    def _replace(self, why: str, state: str) -> None:
        if self._deleting or state == _DELETING:
            self._say(f"{why}; waiting until it is gone")
            self._sleep(self._poll)
            return
        self._say(f"{why}; it is deleted and created anew")
        answer = self._resource.delete(self._stopped)
        if answer.status and answer.code != "NOT_FOUND":
            self._refused(answer)
            return
        self._deleting = True
        # Longer each time: one that fails as soon as it is created is not asked for in a tight loop.
        self._back_off()

    def _refused(self, answer: Answer) -> None:
        self._say(f"gcloud: {answer.error}; trying again")
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
