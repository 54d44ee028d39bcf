from __future__ import annotations

from pathlib import Path

import pytest
from kill_preparing import kill_at_random


@pytest.mark.timeout(300)
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    assert len(kill_at_random("python_stdlib", "bytes", 3, tmp_path, seed=0)) == 3
