"""The console script."""

import signal

import pytest

from sophia_levanter import cli


@pytest.mark.parametrize(
    ("arguments", "status", "wanted"),
    [
        (
            [],
            2,
            "'' is not one of the verbs train, prepare_data, inspect_data, train_tokenizer, ",
        ),
        (
            ["trian"],
            2,
            "'trian' is not one of the verbs train, prepare_data, inspect_data, train_tokenizer, ",
        ),
        (
            ["--help"],
            0,
            "usage: sophia-levanter {train,prepare_data,inspect_data,train_tokenizer,",
        ),
        (["train", "--help"], 0, "--optimizer.learning_rate"),
        (["train", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["compare", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["prepare_data", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["inspect_data", "nowhere"], 2, "nowhere: no finished token store"),
    ],
)
def test_verbs(arguments, status, wanted, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sophia-levanter", *arguments])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert cli.main() == status
    finally:  # a process that trains leaves signals ignored
        for number, handler in before.items():
            signal.signal(number, handler)
    assert wanted in "".join(capsys.readouterr())
