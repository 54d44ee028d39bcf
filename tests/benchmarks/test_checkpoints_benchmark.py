"""The tables are made from small trees; what they say of large ones is in docs/reliability.md."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sophia_levanter.benchmarks import checkpoints


def test_all_ways_save_and_restore_the_same(tmp_path: Path) -> None:
    tree = checkpoints.state_of(1)
    for way in (checkpoints.Ours, checkpoints.PlainZarr, checkpoints.NumpyFiles):
        store = way(tmp_path / way.__name__)
        store.save(tree)
        jax.tree.map(np.testing.assert_array_equal, store.restore(tree), tree)


@pytest.mark.parametrize("table", ["throughput", "blocked", "memory"])
def test_tables(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = ["--saves", "4"] if table == "memory" else ["--rounds", "1"]
    checkpoints.main([table, "--megabytes", "1", "--work", str(tmp_path), *rounds])
    head, line, *rows = [text for text in capsys.readouterr().out.splitlines() if text.startswith("|")]
    assert set(line) <= set("|-: ")
    assert rows and all(row.count("|") == head.count("|") for row in rows)
    assert list(tmp_path.iterdir()) == []
