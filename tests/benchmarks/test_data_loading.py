"""The tables are made from small texts and stores; docs/data.md has those of large ones."""

from pathlib import Path

import data_loading
import pytest

from sophia_levanter.data import token_store


def test_memory_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_loading, "TOKENIZER", "bytes")
    monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", token_store.IN_MEMORY_BYTES)
    (tmp_path / "text.txt").write_text("some text " * 1000)
    data_loading.main(["memory", "--text", str(tmp_path / "text.txt")])
    _, _, once, ten_times = capsys.readouterr().out.splitlines()
    assert once.startswith("| 1 | ")
    assert " | 1.00 | " in once
    assert float(ten_times.split(" | ")[1].replace(",", "")) > 10  # MiB

    data_loading.main(["read", "--tokens", "2000000", "--batches", "3", "--work", str(tmp_path)])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 2,000,000", "cached"],
        ["| 2,000,000", "not cached"],
        ["| 8,000,000", "cached"],
        ["| 8,000,000", "not cached"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]  # the stores are gone
