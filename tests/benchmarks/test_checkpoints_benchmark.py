"""The tables are made from a small tree; docs/reliability.md has those of a large one."""

from pathlib import Path

import checkpoints
import pytest

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


@pytest.mark.parametrize("table", checkpoints.TABLES)
def test_tables(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.main(
        [table, "--megabytes", "1", "--work", str(tmp_path), "--rounds", "4" if table == "memory" else "1"]
    )
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert set(line) <= set("|- ")
    assert len(rows) == (6 if table == "throughput" else 1)
    assert all(row.count("|") == head.count("|") for row in rows)
    assert list(tmp_path.iterdir()) == []
