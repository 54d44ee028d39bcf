import pytest

from sophia_levanter.benchmarks import step_memory
from sophia_levanter.benchmarks.step_memory import measure, temporary_bytes
from sophia_levanter.config.command_line import load_config

SMALL = [("trainer.batch_size", "8")]


@pytest.fixture
def configs(tiny, monkeypatch):
    """The common beginning of the files of three optimizers."""
    monkeypatch.setattr(step_memory, "VOCAB_SIZE", 50)
    text = tiny.read_text()
    tiny.with_name("tiny_sophia_h.yaml").write_text(text.replace("sophia_g", "sophia_h"))
    tiny.with_name("tiny_adamw.yaml").write_text(
        text.replace("{type: sophia_g, warmup_steps: 2, rho: 0.5, interval: 3}", "{type: adamw, warmup_steps: 2}")
    )
    return tiny.with_name("tiny")


def test_temporary_memory_holds_the_gradient_and_grows_with_the_microbatch(configs):
    config = configs.with_name("tiny_sophia.yaml")
    small, large = (
        temporary_bytes(load_config(config, [*SMALL, ("trainer.microbatch_size", size)]), refresh=False)
        for size in ("1", "4")
    )
    matrices = 4 * 2 * 12 * 16 * 16
    assert matrices < small < large


def test_measure_pairs_each_step_with_the_one_beside_it(configs, monkeypatch):
    seen = []

    def counted(config, *, refresh):
        seen.append((type(config.optimizer).__name__, refresh, config.trainer.microbatch_size))
        own = getattr(config.optimizer, "curvature_microbatch_size", None)
        fraction = getattr(config.optimizer, "curvature_batch_fraction", 0)
        return 1000 * config.trainer.microbatch_size + 100 * refresh + 10 * (own or 0) + round(100 * fraction)

    monkeypatch.setattr(step_memory, "temporary_bytes", counted)
    rows = measure(configs, [4], [2, 3, 4], SMALL)
    plain, h_plain = 4050, 4007
    wanted = [(plain, 4000), (h_plain, 4000), (4200, plain), (4150, plain), (4127, h_plain), (4117, h_plain)]
    assert [(row.num_bytes, row.beside_bytes) for row in rows] == wanted
    assert [row.beside for row in rows] == ["AdamW"] * 2 + ["its plain step"] * 4
    assert {s for s in seen if not s[1]} == {(f"{n}Config", False, 4) for n in ("AdamW", "SophiaG", "SophiaH")}


def test_main_prints_a_table(configs, capsys, monkeypatch):
    monkeypatch.setattr(step_memory, "temporary_bytes", lambda config, refresh: 2_000_000 + 1_000_000 * refresh)
    step_memory.main(["--configs", str(configs), "--microbatch_sizes", "2", "--curvature_divisors", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["1.000"] * 2 + ["1.500"] * 3
