from pathlib import Path

import pytest
import step_memory

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def test_a_refresh_needs_more_temporary_memory_than_a_plain_step(config_file: Path) -> None:
    config = load_config(config_file)
    plain, refresh = (step_memory.temporary_bytes(config, refresh=kind, vocab_size=50) for kind in (False, True))
    block_matrices = 4 * 2 * 12 * 16 * 16  # the gradient of two layers, in bytes
    assert block_matrices < plain < refresh


def test_each_step_stands_beside_another(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def counted(config: TrainConfig, *, refresh: bool) -> int:
        own = getattr(config.optimizer, "curvature_microbatch_size", None) or 0
        return 1_000_000 * (config.trainer.microbatch_size or 0) + refresh * 1_000_000 * (1 + own)

    monkeypatch.setattr(step_memory, "temporary_bytes", counted)
    for name, kind in (("adamw", "adamw"), ("sophia", "sophia_g"), ("sophia_h", "sophia_h")):
        own = f"defaults: [{config_file.name}]\noptimizer: {{type: {kind}}}\n"
        config_file.with_name(f"gpt_{name}.yaml").write_text(own)
    beginning = str(config_file.with_name("gpt"))
    step_memory.main(["--configs", beginning, "--microbatch_sizes", "4", "--curvature_divisors", "2", "3"])
    _, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["4", "Sophia-G, plain", "4", "AdamW", "4", "1.000"],
        ["4", "Sophia-H, plain", "4", "AdamW", "4", "1.000"],
        ["4", "Sophia-G, refresh on 1.0 of the batch", "5", "its plain step", "4", "1.250"],
        ["4", "Sophia-G, refresh on 0.5 of the batch", "5", "its plain step", "4", "1.250"],
        ["4", "Sophia-H, refresh in microbatches of 2", "7", "its plain step", "4", "1.750"],
    ]
