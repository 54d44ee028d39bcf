"""Event files, as TensorBoard itself reads them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import record_writer

from sophia_levanter.tracking.tensorboard import TensorBoard
from sophia_levanter.tracking.trackers import Background


def scalars(directory, name):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_resumed_run_takes_the_place_of_what_came_after_its_checkpoint(tmp_path):
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


def test_it_can_be_read_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sophia_levanter.tracking.tensorboard.FLUSH_SECONDS", 0.0)
    tracker = TensorBoard(tmp_path / "tensorboard", 0)
    tracker.log(0, {"train/loss": 1.5})
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(0, 1.5)]
    tracker.close(failed=False)


@pytest.mark.parametrize("steps", [1, 2000])
def test_a_full_disk_is_one_warning(steps, tmp_path, monkeypatch):
    def open_file(path):
        return open("/dev/full", "wb")

    monkeypatch.setattr(record_writer, "open_file", open_file)
    said = []
    tracker = Background("tensorboard", lambda: TensorBoard(tmp_path / "tensorboard", 0), said.append)
    for step in range(steps):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close(failed=False)
    assert said == ["WARNING: tensorboard: [Errno 28] No space left on device; the run goes on without it"]


def test_a_place_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    said = []
    Background("tensorboard", lambda: TensorBoard(tmp_path / "tensorboard", 0), said.append).close(failed=False)
    assert len(said) == 1 and "File exists" in said[0]
