"""Rates of decompositions on this machine."""

import pytest

from sophia_levanter.benchmarks import matrix_rates


def test_a_row_for_each_side(capsys):
    matrix_rates.main(["--sides", "8", "16", "--count", "2", "--rounds", "1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| side | QR, ms | QR, GFLOP/s | Newton-Schulz, GFLOP/s | product, GFLOP/s |"
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] for row in cells] == ["8", "16"]
    for side, milliseconds, qr, *others in cells:
        assert float(qr.replace(",", "")) * float(milliseconds) == pytest.approx(8 / 3 * int(side) ** 3 / 1e6, rel=0.02)
        assert all(float(rate.replace(",", "")) > 0 for rate in others)
