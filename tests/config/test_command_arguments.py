from __future__ import annotations

import pytest

from sophia_levanter.config.arguments import Arguments, parse_arguments
from sophia_levanter.errors import InputError
from sophia_levanter.status import run_command


def parse(*words: str) -> Arguments:
    return parse_arguments(words, options=("--config", "--out"), flags=("--all",), overrides=True)


def test_options_flags_and_overrides() -> None:
    parsed = parse("--config", "a", "--all", "--x.y", "1", "--x.y=2", "--out=b=c", "--x.z=")
    assert parsed == Arguments({"--config": "a", "--out": "b=c"}, {"--all"}, [("x.y", "1"), ("x.y", "2"), ("x.z", "")])


def test_words() -> None:
    assert parse_arguments(["a", "--n", "1", "b"], options=("--n",), words=True).words == ["a", "b"]


def test_options_that_may_be_repeated() -> None:
    parsed = parse_arguments(["--n", "1", "--n=--2"], repeatable=("--n", "--m"))
    assert parsed.repeated == {"--n": ["1", "--2"], "--m": []}
    with pytest.raises(InputError, match="the value of --m is empty"):
        parse_arguments(["--m", ""], repeatable=("--m",))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["word"], "unexpected argument 'word'"),
        (["--other", "1"], "unknown option '--other'; valid sections are model, optimizer"),
        (["--confg", "1"], "unknown option '--confg'; did you mean --config?"),
        (["--all=1"], "--all takes no value, but got '1'"),
        (["--config"], "--config requires a value"),
        (["--config", "--all"], "--config requires a value"),
        (["--config", ""], "the value of --config is empty"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--x.y"], "--x.y requires a value"),
    ],
)
def test_command_lines_that_are_none(words: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse(*words)


def test_overrides_only_where_they_are_meant() -> None:
    with pytest.raises(InputError, match=r"unknown option '--x\.y'; --help shows the options"):
        parse_arguments(["--x.y", "1"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("wrong"), 2, "error: wrong\n"),
        (OSError("failed"), 1, "error: failed\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
    ],
)
def test_errors_are_a_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: object) -> int:
        raise error

    assert run_command([], fail, usage="usage") == status
    assert capsys.readouterr().err == line
    assert run_command(["--help"], fail, usage="usage") == 0
    assert capsys.readouterr().out == "usage\n"
