"""Tables of sharding."""

from pathlib import Path

import pytest

from sophia_levanter.benchmarks import scaling

CONFIGS = Path(__file__).parents[2] / "config"


@pytest.mark.slow
def test_each_of_n_devices_has_its_share_of_the_state():
    header, rows = scaling.state_table(CONFIGS)
    rows = list(rows)
    assert [row[0] for row in rows] == [1, 2, 4, 8]
    assert all(len(row) == len(header) for row in rows)
    # Parameters, momentum and curvature of 355M parameters, 4 bytes each.
    assert float(str(rows[0][1]).replace(",", "")) == pytest.approx(3 * 4 * 354.6, rel=0.01)
    assert all(abs(float(str(row[2])) - 1) < 0.05 for row in rows)


def test_every_configuration_has_a_target():
    assert {path.stem.split("_")[1] for path in CONFIGS.glob("*.yaml")} == set(scaling.TARGETS)
