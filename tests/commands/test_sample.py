"""`sample`: what it prints where, and what it refuses."""

import os
import signal
import subprocess
import sys

import pytest

from sophia_levanter.commands import sample
from sophia_levanter.config.trainer import Sampling
from sophia_levanter.data.tokenizer import ByteTokenizer
from tiny_runs import xla_flags

BYTES = ("--data.tokenizer", "bytes")
END = 256


@pytest.fixture
def run_dir(trained):
    return trained / "run"


@pytest.fixture
def sampled(run_dir, capsys):
    """What the command prints for the run, on standard output and on standard error."""

    def run(*words):
        capsys.readouterr()
        assert sample.main([str(run_dir), "--tokens", "24", *words]) == 0
        return capsys.readouterr()

    return run


def test_a_text_begins_with_its_prompt_and_is_the_seeds(sampled, run_dir):
    first = sampled("--prompt", "Line ")
    assert first.out.startswith("Line ") and first.out.endswith("\n")
    assert len(first.out) > len("Line \n") + 5
    assert first.err.startswith(f"model: step 12 of {run_dir}\n")
    assert " tokens: " in first.err and first.err.endswith(" tokens/s\n")
    assert sampled("--prompt", "Line ").out == first.out
    assert sampled("--prompt", "Line ", "--seed", "1").out != first.out
    assert sampled("--prompt", "Line ", "--step", "6").out != first.out
    assert sampled("--prompt", "Line ", "--mesh.fsdp", "embed").out == first.out


def test_several_texts_have_headings_and_are_those_of_one(sampled, tmp_path):
    (tmp_path / "prompt.txt").write_text("Say:\n")
    shown = sampled(
        "--prompt", "Line ", "--prompt=--x", "--prompt_file", str(tmp_path / "prompt.txt"), "--samples", "2"
    )
    parts = shown.out.removeprefix("--- ").split("\n--- ")
    texts = dict(part.split("\n", 1) for part in parts)
    assert list(texts) == [f"prompt {prompt}, sample {number}" for prompt in (1, 2, 3) for number in (1, 2)]
    assert texts["prompt 1, sample 1"] + "\n" == sampled("--prompt", "Line ").out
    assert texts["prompt 1, sample 1"] != texts["prompt 1, sample 2"]
    assert texts["prompt 2, sample 1"].startswith("--x") and texts["prompt 3, sample 2"].startswith("Say:\n")


def test_without_a_prompt_a_document_begins(sampled):
    shown = sampled("--temperature", "2")
    assert "no prompt: the model begins a new document\n" in shown.err
    assert len(shown.out) > 5


def test_a_folder_of_transformers(gpt2_folder, capsys):
    assert sample.main([str(gpt2_folder), *BYTES, "--prompt", "x" * 16, "--tokens", "20", "--top_k", "3"]) == 0
    assert capsys.readouterr().out.startswith("x" * 16)


@pytest.fixture
def rigged(monkeypatch):
    """Draws what it is told to, and keeps what it was asked for."""
    asked = {}

    def rig(*steps):
        def generate(model, prompts, num_tokens, **arguments):
            asked.update(arguments, prompts=prompts, num_tokens=num_tokens)
            yield from map(list, steps)

        monkeypatch.setattr("sophia_levanter.models.sampling.generate", generate)
        return asked

    return rig


def test_one_text_comes_token_by_token(sampled, rigged, monkeypatch):
    asked = rigged(*([byte] for byte in "né".encode()), [END])
    written = []
    monkeypatch.setattr(sample, "_print_at_once", written.append)
    shown = sampled("--prompt", "To", "--top_p", "0.5", "--top_k", "7", "--temperature", "0.9")
    assert written == ["To", "n", "", "é", "", ""]
    assert shown.out == "\n"
    assert shown.err.splitlines()[-1].startswith("4 tokens: ")
    del asked["keys"]
    assert asked.pop("document_end") is None
    assert asked == {"prompts": [[84, 111]], "num_tokens": 24, "sampling": Sampling(0.9, 7, 0.5), "end_of_text": END}


def test_documents_that_training_masked_begin_anew(sampled, rigged):
    asked = rigged([65])
    assert sampled("--data.mask_documents", "true").out.endswith("A\n")
    assert (asked["prompts"], asked["document_end"]) == ([[END]], END)


def test_a_row_that_has_ended_stays_as_it_is(sampled, rigged):
    rigged([65, 66], [END, 67], [None, 68])
    shown = sampled("--prompt", ">", "--samples", "2")
    assert shown.out == "--- prompt 1, sample 1\n>A\n--- prompt 1, sample 2\n>BCD\n"
    assert shown.err.splitlines()[-1].startswith("5 tokens: ")


def test_what_a_terminal_may_take_for_a_command_is_not_printed():
    given = []
    text = sample._Text(ByteTokenizer(), list(b"\x1b[2J"), given.append)
    for byte in "\r\x07\t\n€".encode():
        text.add(byte)
    text.add(0xC3)
    text.end()
    assert given == ["\ufffd[2J", "\ufffd", "\ufffd", "\t", "\n", "", "", "€", "", "\ufffd"]


def test_a_reader_that_leaves(run_dir):
    """`| head` ends it without a word."""
    command = [sys.executable, "-m", "sophia_levanter.commands.sample", str(run_dir), "--tokens", "100000"]
    environment = os.environ | {"XLA_FLAGS": xla_flags()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        news = process.stderr.read().decode()
        assert process.wait(timeout=60) == 1
    assert "Traceback" not in news and "rror" not in news


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one MODEL, found 0; pass each prompt with --prompt"),
        (["RUN", "Once upon"], "expected one MODEL, found 2"),
        (["RUN", "--prompt", "x" * 17], "prompt 1 has 17 tokens, but the model's context length is 16"),
        (
            ["RUN", "--prompt", "x", "--prompt", "y" * 1700],
            "prompt 2 has 1,700 tokens, but the model's context length is 16",
        ),
        (["RUN", "--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["RUN", "--samples", "0"], "--samples is 0; it must be at least 1"),
        (["RUN", "--seed", "-1"], "--seed is '-1'; it must be an integer"),
        (["RUN", "--top_p", "1.5"], "top_p is 1.5; it must be in (0, 1]"),
        (["RUN", "--top_p", "most"], "--top_p is 'most'; it must be a number"),
        (["RUN", "--temperature", "nan"], "temperature is nan"),
        (["RUN", "--prompt", "a\udcff"], r"--prompt 'a\udcff' is not valid UTF-8"),
        ([""], "empty argument"),
        (["RUN", "--prompt_file", "nowhere.txt"], "nowhere.txt cannot be read: No such file or directory"),
        (["RUN", "--prompt_file", "HERE/empty"], "--prompt_file HERE/empty is empty"),
        (
            ["RUN", "--prompt_file", "HERE/latin1"],
            "--prompt_file HERE/latin1 is not valid UTF-8: invalid byte at offset 3",
        ),
        (["HERE/nowhere"], "HERE/nowhere does not exist; specify a run directory"),
    ],
)
def test_bad_input_is_one_line(words, message, run_dir, tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin1").write_bytes("naïve".encode("latin1").replace(b"na", b"nai"))

    def filled(text):
        return text.replace("RUN", str(run_dir)).replace("HERE", str(tmp_path))

    capsys.readouterr()
    assert sample.main([filled(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    line = shown.err.splitlines()[-1]
    assert line.startswith("error: ") and filled(message) in line
    assert [line for line in shown.err.splitlines() if not line.startswith("model: ")] == [line]


def test_ctrl_c_ends_it_at_once(run_dir):
    words = [sys.executable, "-m", "sophia_levanter.commands.sample", str(run_dir), "--prompt", "To"]
    process = subprocess.Popen(
        [*words, "--tokens", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.endswith("\ninterrupted\n")
