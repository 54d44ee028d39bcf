"""A fake TPU API, and a run for its slices."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_tpu_api import FakeTpuApi, hosts_of_this_machine, serving

from sophia_levanter.cluster.backend import Job


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTpuApi]:
    """Google's API for TPUs, where gcloud looks for it, and hosts that are folders."""
    hosts_of_this_machine(tmp_path)
    with serving(FakeTpuApi()) as api:
        for name, value in api.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield api


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run for its slices."""
    job = Job(Path("My run"), tmp_path / "My run" / "launch")
    job.directory.mkdir(parents=True)
    job.config_file.write_text("trainer: {}\n")
    return job
