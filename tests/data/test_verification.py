"""What is compared while a run reads its text: in the background, and in all processes."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest

from sophia_levanter.data.batches import READING_PATIENCE, Verification
from sophia_levanter.errors import InputError
from sophia_levanter.partition.processes import PATIENCE, Processes


class Corpus:
    """One that is compared when `compared` is set."""

    def __init__(self, whole: Exception | None = None, unchanged: Exception | None = None) -> None:
        self.compared = threading.Event()
        self._whole, self._unchanged = whole, unchanged

    def check_whole(self, cache_dir: Path) -> None:
        assert self.compared.wait(60)
        if self._whole:
            raise self._whole

    def check_unchanged(self) -> None:
        if self._unchanged:
            raise self._unchanged


def test_nothing_is_waited_for_before_the_end(tmp_path: Path) -> None:
    corpus = Corpus()
    verification = Verification([corpus], tmp_path, Processes())
    verification.check()
    corpus.compared.set()
    assert verification.finish()
    assert verification.finish()
    verification.check()


ERRORS = [InputError("the text is damaged"), OSError(errno.EIO, "Input/output error"), KeyError("digest")]


@pytest.mark.parametrize("where", ["whole", "unchanged"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_is_wrong_is_raised_from_then_on(tmp_path: Path, where: str, error: Exception) -> None:
    corpora = [Corpus(**{where: error}), Corpus()]
    verification = Verification(corpora, tmp_path, Processes())
    for corpus in corpora:
        corpus.compared.set()
    for raising in (verification.finish, verification.check, verification.finish):
        with pytest.raises(type(error)) as info:
            raising()
        assert info.value is error


class Answers:
    """Stands for the messages between processes: what this one says, and what others do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.said: list[str] = []
        self.timeouts: list[float] = []
        self.others: list[str] = []

        def gather(processes: Processes, name: str, text: str, timeout: float) -> list[str]:
            self.names.append(name)
            self.said.append(text)
            self.timeouts.append(timeout)
            return [text, *self.others]

        monkeypatch.setattr(Processes, "gather", gather)
        monkeypatch.setattr(Processes, "broadcast", lambda self, name, text, timeout: text)
        monkeypatch.setattr(Processes, "forget", lambda self, name: None)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


def finished(tmp_path: Path, corpus: Corpus, processes: Processes) -> Verification:
    corpus.compared.set()
    return Verification([corpus], tmp_path, processes)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_of_several_processes_all_raise_together(tmp_path: Path, answers: Answers, error: Exception) -> None:
    broken = finished(tmp_path, Corpus(whole=error), Processes(1, 2))
    with pytest.raises(type(error)):
        broken.finish()
    broken.check()  # alone it says nothing: the others would wait for it
    answers.others = answers.said[:]
    sound = finished(tmp_path, Corpus(), Processes(0, 2))
    expected = InputError if isinstance(error, InputError) else OSError
    with pytest.raises(expected, match="KeyError" if isinstance(error, KeyError) else None):
        sound.finish()
    # Where another process has found worse, this one raises that.
    if expected is OSError:
        answers.others = [json.dumps(["wrong", "process 0 has damaged text"])]
        with pytest.raises(InputError, match="process 0 has damaged text"):
            broken.finish()


@pytest.mark.parametrize("signalled", [False, True])
def test_who_is_to_stop_does_not_wait(tmp_path: Path, signalled: bool) -> None:
    """Signalled before it waits, or meanwhile."""
    corpus = Corpus()
    verification = Verification([corpus], tmp_path, Processes())
    looks = iter([signalled, True])
    assert not verification.finish(lambda: next(looks))
    corpus.compared.set()
    assert verification.finish(lambda: True)


def test_where_one_process_has_not_compared_all_say_so(tmp_path: Path, answers: Answers) -> None:
    unfinished = Verification([Corpus()], tmp_path, Processes(0, 2))
    assert not unfinished.finish(lambda: True)
    sound = finished(tmp_path, Corpus(), Processes(0, 2))
    assert sound.finish()
    answers.others = answers.said[:1]
    assert not sound.finish(lambda: True)
    answers.others.append(json.dumps(["wrong", "process 1 has damaged text"]))
    for verification in (unfinished, sound):
        with pytest.raises(InputError, match="process 1 has damaged text"):
            verification.finish(lambda: True)


def test_each_run_of_a_process_has_time_to_read(tmp_path: Path, answers: Answers) -> None:
    for _ in range(3):
        verification = finished(tmp_path, Corpus(), Processes(0, 2))
        verification.finish()
        verification.finish()
    assert answers.timeouts == [READING_PATIENCE, PATIENCE] * 3
    assert len(set(answers.names)) == 6
