"""The console script, and the README's commands one after the other, as a new user gives them, on a small run."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sophia_levanter import cli

ROOT = Path(__file__).parents[1]
VERBS = ["train", "prepare_data", "inspect_data", "train_tokenizer"]  # the first


@pytest.mark.parametrize(
    ("arguments", "status", "wanted"),
    [
        ([], 2, f"usage: sophia-levanter {{{','.join(VERBS)},"),
        (["trian"], 2, f"error: unknown command 'trian'; choose from {', '.join(cli.VERBS)}; did you mean train?\n"),
        (["xyz"], 2, ", launch, tpu\n"),
        (["--help"], 0, f"usage: sophia-levanter {{{','.join(VERBS)},"),
        (["train", "--help"], 0, "--optimizer.learning_rate"),
        *(
            ([verb, "--help"], 0, f"usage: python -m sophia_levanter.commands.{verb}")
            for verb in cli.VERBS
            if verb != "train"
        ),
        (["train", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["inspect_data", "nowhere"], 2, "nowhere contains no finished token store"),
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


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "sophia_levanter"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    usage = done.stderr.splitlines()
    assert usage[0].startswith("usage: sophia-levanter {train,")
    assert [line.split()[0] for line in usage[2:]] == list(cli.VERBS)


@pytest.mark.parametrize("words", [["train", "--help"], ["checkpoints", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_ends_a_command_quietly(words):
    """As `| head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sophia_levanter", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def commands():
    section = (ROOT / "README.md").read_text().split("## Use the trained model")[1]
    block = section.split("```\n")[1]
    return [line for line in block.splitlines() if line.startswith("python -m")]


@pytest.mark.slow
def test_a_run_is_sampled_evaluated_exported_and_reported(config_file, tmp_path):
    def run(line):
        words = [sys.executable, *shlex.split(line.replace("RUN_DIR", "run"))[1:]]
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "XLA_FLAGS": ""}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(f"python -m sophia_levanter.main --config {config_file} --model.seq_len 32 --trainer.run_dir RUN_DIR")
    printed = {line.split()[2].rpartition(".")[2]: run(line) for line in commands()}
    assert list(printed) == ["sample", "evaluate", "export", "report"]
    assert printed["sample"].startswith("def main(")
    assert "nats per token" in printed["evaluate"] and "bits per byte" in printed["evaluate"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "nano").iterdir()}
    assert "finished" in printed["report"] and (tmp_path / "report.html").stat().st_size > 50_000
    # What was exported is a model for the same commands, and for a run to start from.
    assert run("python -m sophia_levanter.commands.sample nano --prompt 'def main(' --tokens 100") == printed["sample"]
    run(
        f"python -m sophia_levanter.main --config {config_file} --model.seq_len 32 --trainer.run_dir second "
        "--trainer.initial_weights nano --quiet"
    )
