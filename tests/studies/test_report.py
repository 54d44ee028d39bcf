"""The tables and pictures of small studies."""

import dataclasses
import sys

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.studies.records import flat_config
from sophia_levanter.studies.report import at_the_edge, write_report
from sophia_levanter.studies.study import PlannedRun, Study

STUDY = Study("small", (), "adamw", 5)
OPTIMIZERS = {"adamw": AdamWConfig, "sophia": SophiaGConfig}


def planned(arm: str, tokens: int, rate: float = 0.01, seed: int = 0) -> PlannedRun:
    trainer = TrainerConfig(num_train_steps=tokens // 100, batch_size=10, seed=seed)
    optimizer = OPTIMIZERS[arm](learning_rate=rate, warmup=0)
    config = TrainConfig(model=Gpt2Config(seq_len=10), optimizer=optimizer, trainer=trainer)
    return PlannedRun(arm, {"optimizer.learning_rate": rate}, tokens, seed, config)


@pytest.fixture
def study(make_record):
    """Runs with records: Sophia's loss at a length is AdamW's at twice that; each token costs it more."""
    losses = {1000: 4.0, 2000: 3.0, 4000: 2.0}
    runs, records = [], []
    for tokens in (1000, 2000):
        for seed in (0, 1):
            for arm, factor in (("adamw", 1), ("sophia", 2)):
                runs.append(planned(arm, tokens, seed=seed))
                more = {"seconds": [0.1, 0.6], "win_rate": [[5, 0.25], [10, 0.5]]} if arm == "sophia" else {}
                loss = losses[factor * tokens] + 0.02 * seed
                records.append(make_record(runs[-1].config, loss=loss, **more))
    runs.append(planned("adamw", 1000, rate=100.0))
    records.append(make_record(runs[-1].config, loss=None, parameters=0, facts={}))
    return runs, records


@pytest.fixture
def no_pngs(monkeypatch):
    """For tests that read the tables; the pictures are drawn and not encoded."""
    monkeypatch.setattr("sophia_levanter.studies.plots.as_png", lambda *_: b"")


def test_the_report_of_a_study(study, tmp_path):
    text = write_report(STUDY, *study, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "# small"
    assert "9 runs ended; 1 diverged. Parameters: 1,000." in lines
    assert "| adamw | 1,000 | 2 | learning_rate 0.01 | 4.0100 ± 0.0141 | 2 |" in lines
    assert "| sophia | 2,000 | 1 | learning_rate 0.01 | 2.0100 ± 0.0141 | 2 |" in lines
    # A token of Sophia-G costs 1 + 2 / 3 / 10 of AdamW's FLOPs, and 0.15 s / 0.1 s of its time.
    assert "| sophia | 2,000 | 2.00 | 1.88 | 1.33 | 2.00–2.00 (2 seeds) |" in lines
    assert "| sophia | 1,000 | >1.00 | >0.94 | >0.67 | >1.00–>1.00 (2 seeds) |" in lines
    assert "| adamw | 1,000 | learning_rate 100 | diverged | 1 | 1 | – |" in lines
    assert "| sophia | 1,000 | learning_rate 0.01 | 3.0100 ± 0.0141 | 2 | 0 | 0.50 |" in lines
    assert lines.index("## All points") > lines.index("## Speed-up over adamw")
    for name in ("final_loss.png", "curves.png", "win_rate.png"):
        assert f"![{name}]({name})" in lines
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_pngs")
def test_steps_that_runs_share_are_counted_once(study, tmp_path):
    runs, records = study
    assert "The runs trained" not in write_report(STUDY, runs, records, tmp_path)
    # Each has a curve of 10 steps of 100 tokens.
    records = [dataclasses.replace(record, seconds=[360.0, None]) for record in records[:4]]
    records[2] = dataclasses.replace(records[2], facts=records[2].facts | {"shared_steps": 8})
    assert (
        "The runs trained for 32 steps (3,200 tokens, 3:12:00 of training time); longer runs reused another 8 steps "
        "from shorter runs, and each step is counted once." in write_report(STUDY, runs, records, tmp_path)
    )


@pytest.mark.usefixtures("no_pngs")
def test_without_a_baseline_there_is_no_speed_up(study, tmp_path):
    assert "Speed-up" not in write_report(dataclasses.replace(STUDY, baseline=None), *study, tmp_path)


@pytest.mark.usefixtures("no_pngs")
def test_without_a_curvature_there_is_no_win_rate(study, tmp_path):
    runs, records = study
    text = write_report(STUDY, [run for run in runs if run.arm == "adamw"], records, tmp_path)
    assert "win_rate.png" not in text and not (tmp_path / "win_rate.png").exists()


def test_a_study_without_runs(study, tmp_path):
    assert write_report(STUDY, study[0], [], tmp_path) == "# small\n\nNo run has finished yet."
    assert list(tmp_path.iterdir()) == []


def test_part_of_a_study(study, tmp_path):
    """No run of the baseline, or none of another arm, is done yet."""
    runs, records = study
    for arm in OPTIMIZERS:
        done = [record for record in records if record.config["optimizer.type"].startswith(arm)]
        assert done
        text = write_report(STUDY, runs, done, tmp_path)
        assert f"| {arm} | 1,000 |" in text and "| sophia | 1,000 | >" not in text


def test_a_study_in_which_all_diverged(study, tmp_path, make_record):
    runs, _ = study
    nothing = {"validation": [], "win_rate": [], "seconds": [None, None], "parameters": 0, "facts": {}}
    records = [make_record(run.config, loss=None, training=[[1, None]], **nothing) for run in runs]
    text = write_report(STUDY, runs, records, tmp_path)
    assert "| sophia | 1,000 | 1 | learning_rate 0.01 | diverged | 2 |" in text
    assert (tmp_path / "final_loss.png").exists()


def test_one_arm_diverged(study, tmp_path, make_record):
    runs, records = study
    records = [
        make_record(run.config, loss=None, seconds=[None, None]) if run.arm == "sophia" else record
        for run, record in zip(runs, records, strict=True)
    ]
    assert "| sophia | 2,000 | <1.00 | <0.94 | <nan | <1.00–<1.00 (2 seeds) |" in write_report(
        STUDY, runs, records, tmp_path
    )


@pytest.mark.usefixtures("no_pngs")
def test_records_that_are_not_asked_for_change_no_table(study, tmp_path, make_record):
    runs, records = study
    later = make_record(config=flat_config(runs[0].config) | {"optimizer.of_tomorrow": 1}, loss=0.1)
    before = write_report(STUDY, runs, records, tmp_path)
    after = write_report(STUDY, runs, [later, *records], tmp_path)
    told = before.replace("9 runs ended", "10 runs ended")
    told = told.replace("Parameters: 1,000.", "Parameters: 1,000. 1 of them is not part of the current study.")
    assert after == told


@pytest.mark.usefixtures("no_pngs")
def test_runs_without_a_result_are_counted(study, tmp_path):
    runs, records = study
    told = "**2 planned runs failed or did not end yet, which may change the best points.**"
    assert told in write_report(STUDY, runs, records[2:], tmp_path)
    assert "planned run" not in write_report(STUDY, runs, records, tmp_path)


@pytest.mark.usefixtures("no_pngs")
def test_a_mixture_is_a_text(study, tmp_path, make_record):
    runs, _ = study
    parts = [{"digest": "abc", "weight": 1.0}, {"digest": "xyz", "weight": 3.0}]
    records = [make_record(run.config, facts={"data": {"mixture": parts}}) for run in runs]
    assert "training texts" not in write_report(STUDY, runs, records, tmp_path)
    records[0] = make_record(runs[0].config, facts={"data": {"mixture": parts[:1]}})
    assert "**The runs used 2 different training texts.**" in write_report(STUDY, runs, records, tmp_path)


@pytest.mark.usefixtures("no_pngs")
def test_runs_of_different_texts_are_pointed_out(study, tmp_path, make_record):
    runs, records = study
    other = make_record(runs[0].config, facts={"data": {"digest": "xyz"}})
    assert "**The runs used 2 different training texts.**" in write_report(STUDY, runs, [other, *records[1:]], tmp_path)


def test_without_matplotlib_it_says_what_to_install(study, tmp_path, monkeypatch):
    from sophia_levanter.errors import InputError

    monkeypatch.setitem(sys.modules, "sophia_levanter.studies.plots", None)
    with pytest.raises(InputError, match=r"install sophia-levanter\[compare\]"):
        write_report(STUDY, *study, tmp_path)


@pytest.mark.usefixtures("no_pngs")
def test_what_speaks_against_the_best_points(make_record, tmp_path):
    runs = [planned("sophia", 1000, rate=rate) for rate in (0.1, 0.2, 0.4)]
    runs += [planned("adamw", 1000, rate=rate) for rate in (0.1, 0.2, 0.4)]
    losses = [3.0, 2.0, 1.0, 2.0, 1.0, 3.0]
    win_rates = [{"win_rate": [[10, 0.01]]}] * 3 + [{}] * 3
    records = [
        make_record(run.config, loss=loss, **more) for run, loss, more in zip(runs, losses, win_rates, strict=True)
    ]
    text = write_report(dataclasses.replace(STUDY, evaluations=2), runs, records, tmp_path)
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- **sophia: the best learning_rate, 0.4, is at the edge of its grid; try larger values.**",
        "- **sophia: the last win rate is 0.01; typical values are 0.1 to 0.9, so try a larger rho.**",
        "- **2 validation losses in a run are too few for a curve; use 5 or more.**",
    ]


def test_a_switch_has_no_edge():
    tried = [{"optimizer.cautious": value, "optimizer.b1": 0.9} for value in (False, True)]
    assert list(at_the_edge("sophia", tried[1], tried)) == []


@pytest.mark.usefixtures("no_pngs")
def test_where_nothing_speaks_against_them(study, tmp_path):
    assert "- **" not in write_report(STUDY, study[0][:-1], study[1][:-1], tmp_path)
