from collections.abc import Callable
from typing import Any

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.studies.records import Record, flat_config
from sophia_levanter.studies.results import Cell


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """A record of a finished run; keyword arguments change it, `loss=None` makes it a diverged one."""

    def make(config: TrainConfig | None = None, /, **changes: Any) -> Record:
        fields: dict[str, Any] = {
            "config": flat_config(config or TrainConfig()),
            "loss": 2.0,
            "bits_per_byte": 2.9,
            "validation": [[5, 2.5], [10, 2.0]],
            "training": [[5, 2.6], [10, 2.1]],
            "win_rate": [],
            "seconds": [0.1, None],
            "parameters": 1000,
            "flops_per_token": 6000.0,
            "facts": {"data": {"digest": "abc"}, "version": "1"},
        }
        fields |= changes
        fields.setdefault("status", "diverged" if fields["loss"] is None else "done")
        return Record(**fields)

    return make


@pytest.fixture
def make_cell(make_record: Callable[..., Record]) -> Callable[..., Cell]:
    """A cell with these losses for the seeds 0, 1, ...; or for those named by a dict."""

    def make(arm: str, tokens: int, losses: list[float | None] | dict[int, float | None], **point: Any) -> Cell:
        by_seed = losses if isinstance(losses, dict) else dict(enumerate(losses))
        return Cell(arm, point, tokens, {seed: make_record(loss=loss) for seed, loss in by_seed.items()})

    return make
