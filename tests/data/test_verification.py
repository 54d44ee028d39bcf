"""What a run learns of its text in the background, and when."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sophia_levanter.data.verification import Verification
from sophia_levanter.errors import InputError
from sophia_levanter.partition.messages import Processes


class Corpus:
    """One that is compared when `compared` is set."""

    def __init__(self, whole: str | None = None, unchanged: str | None = None) -> None:
        self.compared = threading.Event()
        self._whole, self._unchanged = whole, unchanged

    def check_whole(self, cache_dir: Path) -> None:
        assert self.compared.wait(60)
        if self._whole:
            raise InputError(self._whole)

    def check_unchanged(self) -> None:
        if self._unchanged:
            raise InputError(self._unchanged)


def test_nothing_is_waited_for_before_the_end(tmp_path: Path) -> None:
    corpus = Corpus()
    verification = Verification([corpus], tmp_path, Processes())
    verification.check()
    corpus.compared.set()
    verification.finish()
    verification.finish()
    verification.check()


@pytest.mark.parametrize("wrong", [{"whole": "the first is damaged"}, {"unchanged": "the first changed"}])
def test_what_is_wrong_is_raised_from_then_on(tmp_path: Path, wrong: dict[str, str]) -> None:
    corpora = [Corpus(**wrong), Corpus()]
    verification = Verification(corpora, tmp_path, Processes())
    for corpus in corpora:
        corpus.compared.set()
    for raising in (verification.finish, verification.check, verification.finish):
        with pytest.raises(InputError, match="the first"):
            raising()


def test_of_several_processes_all_raise_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []

    def first_failure(self: Processes, name: str, failure: str | None, timeout: float) -> str | None:
        said.append(failure)
        return "process 1 has damaged text"

    monkeypatch.setattr(Processes, "first_failure", first_failure)
    monkeypatch.setattr(Processes, "forget", lambda self, name: None)
    corpus = Corpus()
    corpus.compared.set()
    verification = Verification([corpus], tmp_path, Processes(0, 2))
    with pytest.raises(InputError, match="process 1 has damaged text"):
        verification.finish()
    assert said == [None]
    broken = Verification([Corpus(whole="ours")], tmp_path, Processes(1, 2))
    broken._corpora[0].compared.set()
    with pytest.raises(InputError, match="process 1 has damaged text"):
        broken.finish()
    broken.check()  # alone it says nothing: the others would wait for it
    assert said == [None, "ours"]
