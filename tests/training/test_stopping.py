"""The first signal asks a run to stop, the second acts."""

import signal

import pytest

from sophia_levanter.training.stopping import StopRequest


@pytest.fixture(autouse=True)
def default_handlers():
    """Ctrl-C's own handler: a process started in the background of a script begins with the signal ignored."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_the_first_ctrl_c_is_noted_and_the_second_acts():
    stop = StopRequest()
    assert stop.signal is None
    signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("further", [signal.SIGTERM, signal.SIGINT])
def test_after_sigterm_no_signal_stops_the_saving(further):
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    for _ in range(3):
        signal.raise_signal(further)
    assert stop.signal == signal.SIGTERM


def test_sigterm_counts_after_ctrl_c_too():
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert stop.signal == signal.SIGTERM
