"""What launched runs are compared with."""

import os
import subprocess
import sys

import pytest
from launched import OPTIONS, losses

from tiny_runs import xla_flags


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the launched runs as one process with two devices has them."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    environment = os.environ | {"XLA_FLAGS": xla_flags(2)}
    words = [sys.executable, "-m", "sophia_levanter.main", *OPTIONS, "--trainer.run_dir", str(run_dir)]
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    return losses(run_dir)
