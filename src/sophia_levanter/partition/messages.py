"""What the processes of a run tell each other from any thread: by jax's coordination service, so that a device that
hangs or computes is not waited for, and always with a timeout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import distributed

from sophia_levanter.errors import InputError

# Seconds that a process waits for what another does, beyond what it has needed for the same itself.
PATIENCE = 120.0


class NoAnswer(Exception):
    """A process did not say what it should have in time; the message is one line with its number."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run. Each message has a name that all of them use once.

    Attributes:
        index: the number of this process.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @staticmethod
    def of_this_run() -> Processes:
        return Processes(jax.process_index(), jax.process_count())

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def gather(self, name: str, text: str, timeout: float) -> list[str]:
        """All processes' texts, for the first process; an empty list for the others, which do not wait.

        Raises:
            NoAnswer: if a text does not come within `timeout` seconds.
        """
        if self.is_first:
            return [text, *(self._receive(f"{name}/{i}", i, timeout) for i in range(1, self.count))]
        self._send(f"{name}/{self.index}", text)
        return []

    def broadcast(self, name: str, text: str | None, timeout: float) -> str:
        """The first process's text, for all of them; what others give is not looked at.

        Raises:
            NoAnswer: if it does not come within `timeout` seconds.
        """
        if not self.is_first:
            return self._receive(name, 0, timeout)
        assert text is not None
        if self.count > 1:
            self._send(name, text)
        return text

    def first_failure(self, name: str, failure: str | None, timeout: float) -> str | None:
        """What one of the processes has to complain of, the same for all of them; None if none has."""
        failures = [text for text in self.gather(f"{name}/failures", failure or "", timeout) if text]
        return self.broadcast(f"{name}/failure", failures[0] if failures else "", timeout) or None

    def on_process_zero(self, name: str, work: Callable[[], None]) -> None:
        """Have process zero do some work; an `InputError` of it is raised in all processes."""
        raised = None
        if self.is_first:
            try:
                work()
            except InputError as error:
                raised = error
        if failure := self.first_failure(name, str(raised) if raised else None, PATIENCE):
            raise raised or InputError(failure)

    def forget(self, name: str) -> None:
        """Free the memory of all messages under a name; by the first process, when all have read them."""
        if self.is_first and self.count > 1:
            _client().key_value_delete(f"sophia_levanter/{name}/")

    def _send(self, name: str, text: str) -> None:
        # The service takes no empty text.
        _client().key_value_set(f"sophia_levanter/{name}", f"={text}")

    def _receive(self, name: str, process: int, timeout: float) -> str:
        try:
            return _client().blocking_key_value_get(f"sophia_levanter/{name}", int(timeout * 1000))[1:]
        except Exception as error:  # jaxlib's own, of several kinds
            what = "DEADLINE_EXCEEDED" in str(error) and f"did not answer within {timeout:.0f} s"
            raise NoAnswer(f"process {process} {what or f'is gone: {str(error).splitlines()[0]}'}") from error


def _client() -> Any:
    return distributed.global_state.client
