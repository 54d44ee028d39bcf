from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sophia_levanter import main as train
from sophia_levanter.commands import inspect_data, prepare_data, train_tokenizer
from sophia_levanter.data.token_store import TokenStore

TEXTS = [f"the document number {i}, naïve\n" * 3 for i in range(60)]


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "data.yaml").write_text(
        f"data:\n  train: {tmp_path}/train.jsonl\n  validation_fraction: 0.2\n  cache_dir: {tmp_path}/cache\n"
        "model:\n  seq_len: 32\n"
    )
    return str(tmp_path / "data.yaml")


def store_of(tmp_path: Path) -> str:
    (folder,) = (tmp_path / "cache").iterdir()
    return str(folder)


def test_a_part_of_a_mixture_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("long", "a" * 100), ("short", "b" * 31)):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "data.yaml").write_text(
        f"data:\n  train: [{{source: {tmp_path}/long.txt}}, {{source: {tmp_path}/short.txt}}]\n"
        f"  validation: {tmp_path}/long.txt\n  cache_dir: {tmp_path}/cache\nmodel:\n  seq_len: 32\n"
    )
    assert prepare_data.main(["--config", str(tmp_path / "data.yaml")]) == 2
    error = "error: part 1 of data.train has 32 tokens, but one sequence requires 33 (model.seq_len + 1)"
    assert capsys.readouterr().err.startswith(error)


def test_prepare_and_inspect(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_data.main(["--config", config]) == 0
    out = capsys.readouterr().out
    assert "data.train: 60 documents" in out
    assert "validation tokens (bytes)" in out
    assert prepare_data.main(["--config", config]) == 0
    assert "is already prepared" in capsys.readouterr().out
    assert inspect_data.main([store_of(tmp_path), "--documents", "2", "--verify"]) == 0
    out = capsys.readouterr().out
    assert out.count("verified") == 2
    assert out.count("  document ") == 4
    assert "the document number" in out
    assert "tokenizer   bytes (" in out
    shown = re.findall(r"tokens +([\d,]+) .*\n +text +([\d,]+) bytes, ([\d.]+) per token", out)
    assert len(shown) == 2
    for tokens, size, mean in shown:
        assert mean == f"{int(size.replace(',', '')) / int(tokens.replace(',', '')):.2f}"
    assert out.count("  packing     ") == 2 and "documents per sequence of 1,024 tokens (--seq_len)" in out
    words = [f"{store_of(tmp_path)}/train", "--documents", "0", "--seq_len", "32"]
    assert inspect_data.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"lengths +median document 9\d tokens, longest 94\n", out)
    # No sequence of 32 has more than two of them.
    found = re.search(r"packing +1\.(\d\d) documents .* of 32 tokens \(--seq_len\); ([\d.]+)% of the seq", out)
    assert int(found[1]) == pytest.approx(100 - float(found[2]), abs=1)
    assert 5 < float(re.search(r"mask_documents removes ([\d.]+)% of the attention pairs", out)[1]) < 20
    # The same, where not all ends of documents are read at once.
    sizes, document_ends = [], TokenStore.document_ends

    def noted(store: TokenStore, first: int, last: int) -> np.ndarray:
        sizes.append(last - first)
        return document_ends(store, first, last)

    monkeypatch.setattr(TokenStore, "document_ends", noted)
    monkeypatch.setattr(inspect_data, "DOCUMENTS_AT_ONCE", 7)
    assert inspect_data.main(words) == 0
    assert capsys.readouterr().out == out and max(sizes) == 7
    assert inspect_data.main([f"{store_of(tmp_path)}/train", "--documents", "1000"]) == 0
    assert capsys.readouterr().out.count("  document ") > 40


def test_a_tokenizer_is_trained_and_used(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "my.tiktoken")
    assert train_tokenizer.main(["--config", config, "--vocab_size", "300", "--out", out]) == 0
    assert capsys.readouterr().out == f"wrote 300 tokens, including the end-of-text token, to {out}\n"
    assert prepare_data.main(["--config", config, "--data.tokenizer", out]) == 0
    capsys.readouterr()
    assert inspect_data.main([store_of(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"tokenizer   {out} (" in shown
    assert "the document number" in shown
    # Another one in its place is not taken for it.
    assert train_tokenizer.main(["--config", config, "--vocab_size", "280", "--out", out]) == 0
    capsys.readouterr()
    assert inspect_data.main([store_of(tmp_path)]) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_held_out_documents_train_no_tokenizer(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*TEXTS, *("zqzqzqzqzq " * 50 + str(i) for i in range(3))]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out = tmp_path / "my.tiktoken"
    arguments = ["--config", config, "--vocab_size", "270", "--out", str(out), "--data.validation_fraction"]
    assert train_tokenizer.main([*arguments, "0.000001"]) == 0
    with_them = out.read_text()
    assert train_tokenizer.main([*arguments, "0.999999"]) == 0
    assert out.read_text() != with_them


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (prepare_data, [], "--config FILE is missing"),
        (prepare_data, ["--config", "CONFIG", "--data.train", "/gone"], "data.train: no file matches"),
        (prepare_data, ["--config", "CONFIG", "--data.document_separator", ""], "data.document_separator is empty"),
        (
            prepare_data,
            ["--config", "CONFIG", "--model.seq_len", "999999"],
            "one sequence requires 1000000 (model.seq_len + 1)",
        ),
        (inspect_data, [], "expected one STORE, found 0"),
        (inspect_data, ["/gone"], "no finished token store"),
        (inspect_data, ["/gone", "--documents", "-1"], "--documents is '-1'"),
        (inspect_data, ["/gone", "--seq_len", "0"], "--seq_len is 0; it must be at least 1"),
        (train_tokenizer, ["--config", "CONFIG"], "--vocab_size N is missing; GPT-2 uses 50257"),
        (train_tokenizer, ["--config", "CONFIG", "--vocab_size", "x", "--out", "a.tiktoken"], "--vocab_size is 'x'"),
        (
            train_tokenizer,
            ["--config", "CONFIG", "--vocab_size", "300", "--out", "a.json"],
            "must end in .tiktoken",
        ),
        (train_tokenizer, ["--config", "CONFIG", "--vocab_size", "9", "--out", "a.tiktoken"], "--vocab_size is 9"),
    ],
)
def test_bad_input_is_a_line_and_status_2(
    config: str, command, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([config if word == "CONFIG" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


def test_training_finds_what_was_prepared_by_relative_names(
    config: str,
    config_file: Path,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = ["--data.train", "../train.jsonl", "--data.cache_dir", "../cache"]
    assert prepare_data.main(["--config", config, *names]) == 0
    assert inspect_data.main([f"../cache/{Path(store_of(tmp_path)).name}"]) == 0
    capsys.readouterr()
    arguments = ["--config", str(config_file), *names, "--data.validation_fraction", "0.2"]
    arguments += ["--optimizer.type", "adamw"]
    stop_after(0)
    assert train.main([*arguments, "--trainer.run_dir", "../run"]) == 130
    assert "is already prepared" in capsys.readouterr().out
    assert train.main(["--resume", "../run"]) == 0


def test_a_text_without_documents_trains_no_tokenizer(config: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    arguments = ["--config", config, "--vocab_size", "300", "--out", str(tmp_path / "a.tiktoken")]
    assert train_tokenizer.main([*arguments, "--data.train", str(tmp_path / "empty.txt")]) == 2
    assert "contains no documents with text" in capsys.readouterr().err
    assert not (tmp_path / "a.tiktoken").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_end_a_preparation_with_one_line(tmp_path: Path, number: signal.Signals, status: int) -> None:
    (tmp_path / "many.jsonl").write_text((json.dumps({"text": "words and words " * 2000}) + "\n") * 4000)
    (tmp_path / "my.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    (tmp_path / "data.yaml").write_text(f"data: {{tokenizer: {tmp_path}/my.tiktoken, num_workers: 2}}\n")
    command = [sys.executable, "-m", "sophia_levanter.commands.prepare_data", "--config", str(tmp_path / "data.yaml")]
    command += ["--data.train", str(tmp_path / "many.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert "preparing" in process.stdout.readline()
    time.sleep(0.4)  # about when the workers import what they need
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.count("\n") == 1
    assert "run the same command again to continue" in error
