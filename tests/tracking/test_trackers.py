"""Optional trackers: a failure is reported once and delays nothing. Metrics under the Sophia authors' names. Event
files, as TensorBoard itself reads them."""

import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import record_writer

from sophia_levanter.tracking import trackers
from sophia_levanter.tracking.tensorboard import TensorBoard
from sophia_levanter.tracking.trackers import AuthorsMetrics, Background


class Recorder:
    """Keeps what it is given, and does `trouble` when it is asked to log or to close."""

    def __init__(self, in_log=None, in_close=None):
        self.logged, self.closed = [], []
        self._in_log, self._in_close = in_log, in_close

    def log(self, step, metrics):
        if self._in_log is not None:
            self._in_log()
        self.logged.append((step, metrics))

    def close(self, *, failed):
        if self._in_close is not None:
            self._in_close()
        self.closed.append(failed)


def full_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failed", [False, True])
def test_everything_arrives_in_order(failed):
    recorder, said = Recorder(), []
    tracker = Background("recorder", lambda: recorder, said.append)
    for step in range(1000):
        tracker.log(step, {"train/loss": float(step)})
    tracker.close(failed=failed)
    assert recorder.logged == [(step, {"train/loss": float(step)}) for step in range(1000)]
    assert recorder.closed == [failed] and not said


@pytest.mark.parametrize(
    "make",
    [full_disk, lambda: Recorder(in_log=full_disk), lambda: Recorder(in_close=full_disk)],
    ids=["start", "log", "close"],
)
def test_a_failure_is_one_warning(make):
    said = []
    tracker = Background("recorder", make, said.append)
    for step in range(5):
        tracker.log(step, {})
        time.sleep(0.01)
    tracker.close(failed=False)
    tracker.close(failed=False)
    assert said == ["WARNING: recorder: [Errno 28] No space left on device; the run continues without it"]


def test_messages_of_several_lines_and_none_are_one_line():
    def fail(error):
        def start():
            raise error

        return start

    said = []
    for error in (ValueError("one\n  two"), KeyError()):
        Background("recorder", fail(error), said.append).close(failed=False)
    assert [line.split(": ")[2] for line in said] == [
        "one two; the run continues without it",
        "KeyError; the run continues without it",
    ]


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_one_that_hangs_holds_nobody_up(where):
    released, said = threading.Event(), []
    recorder = Recorder(in_log=released.wait if where == "log" else None, in_close=released.wait)

    def start():
        if where == "start":
            released.wait()
        return recorder

    tracker = Background("recorder", start, said.append)
    began = time.monotonic()
    tracker.log(0, {})
    tracker.close(failed=False, seconds=0.2)
    released.set()
    assert time.monotonic() - began < 5
    assert said == ["WARNING: recorder: did not finish within 0 s; the run continues without it"]


@pytest.mark.parametrize("late", ["log", "close"])
def test_one_that_does_not_keep_up_is_left_out(late, monkeypatch):
    monkeypatch.setattr(trackers, "LONGEST_QUEUE", 3)
    released, said = threading.Event(), []
    recorder = Recorder(in_log=released.wait)
    tracker = Background("recorder", lambda: recorder, said.append)
    tracker.log(0, {})
    while not tracker._queue.empty():
        time.sleep(0.001)
    for step in range(1, 4 if late == "close" else 9):
        tracker.log(step, {})
    tracker.close(failed=False)
    released.set()
    tracker._thread.join()
    assert said == ["WARNING: recorder: cannot keep up: 3 records are waiting; the run continues without it"]
    assert len(recorder.logged) == 1 and not recorder.closed


STEP = {"train/loss": 2.0, "train/learning_rate": 1e-3, "train/mfu": 0.25}


def test_names_and_units():
    refreshed = STEP | {
        "train/parameter_norm": 7.0,
        "optim/win_rate": 0.5,
        "optim/curvature_norm": 3.0,
        "optim/momentum_norm": 4.0,
    }
    assert AuthorsMetrics(1.0).of(5, refreshed) == {
        "iter": 5.0,
        "lr": 1e-3,
        "mfu": 25.0,
        "param_norm": 7.0,
        "train/win_rate": 0.5,
        "hessian_norm2": 3.0,
        "momentum_norm": 4.0,
    }
    assert AuthorsMetrics(1.0).of(5, {"validation/loss": 2.5}) == {"iter": 5.0, "val/loss": 2.5}


@pytest.mark.parametrize(("limit", "rates"), [(1.0, [0, 1 / 2, 2 / 3, 2 / 4]), (None, [0, 0, 0, 0])])
def test_the_share_of_clipped_steps(limit, rates):
    metrics = AuthorsMetrics(limit)
    found = [metrics.of(step, {"train/grad_norm": norm})["train/clip_rate"] for step, norm in enumerate([1, 2, 3, 0.5])]
    assert found == pytest.approx(rates)


def scalars(directory, name):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_events_of_a_resumed_run_take_the_place_of_what_came_after_its_checkpoint(tmp_path):
    # Both within a second, which is what file names tell apart.
    for first, last, offset in ((0, 5, 0.0), (3, 7, 0.5)):
        tracker = TensorBoard(tmp_path / "tensorboard", first)
        for step in range(first, last):
            tracker.log(step, {"train/loss": step + offset})
            tracker.log(step, {"validation/loss": float(step)})
        tracker.close(failed=False)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert scalars(tmp_path / "tensorboard", "train/loss") == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5), (6, 6.5),
    ]  # fmt: skip
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "validation/loss")] == list(range(7))


def test_events_can_be_read_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sophia_levanter.tracking.tensorboard.FLUSH_SECONDS", 0.0)
    tracker = TensorBoard(tmp_path / "tensorboard", 0)
    tracker.log(0, {"train/loss": 1.5})
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(0, 1.5)]
    tracker.close(failed=False)


@pytest.mark.parametrize("steps", [1, 2000])
def test_a_full_disk_under_the_events_is_one_warning(steps, tmp_path, monkeypatch):
    def open_file(path):
        return open("/dev/full", "wb")

    monkeypatch.setattr(record_writer, "open_file", open_file)
    said = []
    tracker = Background("tensorboard", lambda: TensorBoard(tmp_path / "tensorboard", 0), said.append)
    for step in range(steps):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close(failed=False)
    assert said == ["WARNING: tensorboard: [Errno 28] No space left on device; the run continues without it"]


def test_events_that_cannot_be_written_are_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    said = []
    Background("tensorboard", lambda: TensorBoard(tmp_path / "tensorboard", 0), said.append).close(failed=False)
    assert len(said) == 1 and "File exists" in said[0]
