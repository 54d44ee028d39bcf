"""Names of others in a terminal, on a page and in pictures."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from sophia_levanter.checkpoint import Retention, save
from sophia_levanter.commands.checkpoints import main as checkpoints
from sophia_levanter.commands.compare import main as compare
from sophia_levanter.commands.report import main as report
from sophia_levanter.data.tokenizer import printable
from sophia_levanter.errors import CONTROLS, InputError, Problems, counted, one_line, shortened
from sophia_levanter.main import main as train
from sophia_levanter.studies.runs import Run
from tiny_runs import run_config, write_run

# A colour, a title, a bell, a line of its own, an override of the direction, a C1 control, and HTML.
HOSTILE = "a\x1b[31m\x1b]0;title\x07\nerror: b\r\u202ec\x9b2J\u2028<script>&"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain näme 名 👩‍💻", "plain näme 名 👩‍💻"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("\u202e\u2066\u2069\u2028", "\\u202e\\u2066\\u2069\\u2028"),
        ("\udcff", "\\udcff"),
        ("x" * 300, "x" * 300),
        (f"path {'x' * 200}/{'y' * 200}", f"path {'x' * 150}…{'y' * 149}"),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_a_long_name_loses_its_middle() -> None:
    assert [shortened("abcdefgh", most) for most in (8, 7, 6)] == ["abcdefgh", "abc…fgh", "abc…gh"]


@pytest.mark.parametrize("text", ["\x1b[31m", "\u202e", "\x07", "\x9b", "\u2029", "\r"])
def test_what_a_model_writes_cannot_steer_a_terminal(text: str) -> None:
    assert printable(f"a\n{text}\tb") == "a\n\N{REPLACEMENT CHARACTER}" + text[1:] + "\tb"


def clean(capfd: pytest.CaptureFixture[str]) -> str:
    out = "".join(capfd.readouterr())
    assert not CONTROLS.search(out.replace("\n", "")) and "Traceback" not in out
    assert not re.search("^error: b", out, re.MULTILINE)
    return out


def test_names_of_runs_in_a_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from sophia_levanter.studies import page, plots

    drawn: list[str] = []

    def picture(panel: object, runs: list[Run], axis: object) -> str:
        drawn.extend(str(plots._sample(run.name).get_label()) for run in runs)
        return "data:"

    monkeypatch.setattr(page, "svg", picture)
    monkeypatch.setattr(page, "png", lambda panels, runs: b"")
    lines = [{"step": 0, "train/loss": 5.0}, {"step": 1, "train/loss": 4.0, HOSTILE: 1.0}]
    config = run_config(data={"train": HOSTILE, "validation": HOSTILE, "tokenizer": "bytes"})
    name = HOSTILE.replace("/", "")
    for folder in (name, "_b", "c"):
        write_run(tmp_path / folder, config, lines)
    words = [str(tmp_path / name), str(tmp_path / "_b"), f"{'long' * 30}$={tmp_path / 'c'}"]
    assert report([*words, "-o", str(tmp_path / "report.html")]) == 0
    assert "a\\x1b[31m" in clean(capfd)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not CONTROLS.search(html.replace("\n", "")) and "<script>" not in html
    assert not CONTROLS.search("".join(drawn)) and drawn[1] == " _b"
    assert (len(drawn[2]), drawn[2][:20], drawn[2][-5:]) == (40, "long" * 5, "long$") and "…" in drawn[2]


def test_paths_in_errors_and_lines_of_a_run(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["--config", str(tmp_path / HOSTILE)],
        ["--config", str(config_file), "--trainer.run_dir", str(config_file / HOSTILE)],
        ["--config", str(config_file), f"--{HOSTILE}", "1"],
        ["--config", str(config_file), "--data.train", HOSTILE],
        ["--config", str(config_file), "--trainer.seed", "9" * 4000],
    ):
        assert train(words) == 2
        out = clean(capfd)
        assert out.splitlines()[-1].startswith("error: ") and len(out) < 2000
    assert report([str(tmp_path / HOSTILE)]) == 2
    assert clean(capfd).count("\n") == 1


def test_what_a_checkpoint_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = {HOSTILE: {"b": jnp.ones(3)}}
    metadata = {"metrics": {HOSTILE: 1.0}, "code": HOSTILE, "config": {HOSTILE: {HOSTILE: HOSTILE}}}
    save(tmp_path, 1, tree, run_id=HOSTILE, metadata=metadata, retention=Retention(9))  # type: ignore[arg-type]
    save(tmp_path, 2, {"c": jnp.ones(2)}, run_id="b", metadata={}, retention=Retention(9))
    for words in (["list"], ["show", "--step", "1"], ["verify"]):
        assert checkpoints([words[0], str(tmp_path), *words[1:]]) == 0
        clean(capfd)
    assert checkpoints(["diff", str(tmp_path), "1", "2"]) == 0
    clean(capfd)
    next((tmp_path / "step-00000001").rglob("zarr.json")).unlink()
    assert checkpoints(["verify", str(tmp_path)]) == 1
    clean(capfd)


@pytest.mark.parametrize("name", [HOSTILE.replace(".", ""), "x" * 61, "a\u202eb", "\x1b"])
def test_names_of_a_study_s_arms(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = {"tokens": [10_000], "arms": {name: {"settings": {"optimizer": {"type": "adamw"}}}}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    assert compare(["--config", str(tmp_path / "study.yaml"), "--plan"]) == 2
    assert "at most 60 printable characters" in clean(capfd)


@pytest.mark.parametrize(
    ("number", "what", "shown"),
    [
        (1, "layer", "1 layer"),
        (0, "step", "0 steps"),
        (12_000, "step", "12,000 steps"),
        (2, "process", "2 processes"),
        (3, "microbatch", "3 microbatches"),
    ],
)
def test_numbers_of_things(number, what, shown):
    assert counted(number, what) == shown


def test_problems_are_reported_at_once():
    problems = Problems()
    problems.report()
    for message in ("a is missing", "b is missing", "a is missing"):
        with problems:
            raise InputError(message)
    with pytest.raises(InputError, match=r"^a is missing; and b is missing$"):
        problems.report()
    with pytest.raises(KeyError), problems:
        raise KeyError("a fault of the program")
