"""Which runs of several lengths share their first steps, and how a run begins with those of a shorter one."""

import dataclasses
import importlib
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, AdEMAMixConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig
from sophia_levanter.config.schedule import ConstantSchedule, CosineSchedule, WarmupStableDecaySchedule
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.files import lock
from sophia_levanter.run.directory import LOCK_NAME, RunDirectory
from sophia_levanter.run.resuming import steps_in_common
from sophia_levanter.studies.runner import job_directory, jobs_of
from sophia_levanter.studies.sharing import SHARED_STEPS, Start, begin, find_starts, steps_taken_over
from tiny_runs import FACTS, content, step_lines, write_manifest, write_run

WSD = WarmupStableDecaySchedule(decay=0.25)


def config(steps: int, *, schedule=WSD, warmup: float = 2, **trainer) -> TrainConfig:
    every = trainer.pop("evaluate_every", steps // 2)
    return TrainConfig(
        model=Gpt2Config(num_layers=1, num_heads=1, embed_dim=8, seq_len=10),
        optimizer=AdamWConfig(schedule=schedule, warmup=warmup, final_learning_rate=0.0),
        trainer=TrainerConfig(num_train_steps=steps, batch_size=5, evaluate_every=every, **trainer),
    )


def starts(*configs: TrainConfig) -> tuple[list[tuple[str, int] | None], str | None]:
    """Of each of these, in directories a, b, ...: which it begins with, and with how many steps."""
    runs = {Path("abcdefgh"[i]): config for i, config in enumerate(configs)}
    found, hindrance = find_starts(runs)
    return [(found[d].directory.name, found[d].step) if d in found else None for d in runs], hindrance


def test_each_length_begins_where_the_next_shorter_one_decays():
    """Of 10 steps, 2 of them warm-up, the last 2 decay, and the first of these still has the peak; of 20 the last 4."""
    assert starts(config(10), config(20), config(40)) == ([None, ("a", 9), ("b", 17)], None)
    # However they are ordered, and whatever else is between them.
    seed = {"seed": 1}
    assert starts(config(20), config(10, **seed), config(10), config(20, **seed)) == (
        [("c", 9), None, None, ("b", 9)],
        None,
    )


def test_runs_of_one_length_do_not_begin_with_each_other():
    assert starts(config(10), config(10, log_every=3), config(20)) == ([None, None, ("b", 9)], None)
    assert starts(config(10), config(20, statistics_every=3)) == ([None, None], None)


def test_the_shared_steps_have_a_divisor_to_save_at():
    assert steps_in_common(config(1060), config(2120)) == 797  # a prime
    assert starts(config(1060), config(2120))[0][1] == ("a", 795)


def test_what_decays_at_once_or_differs_otherwise_shares_nothing():
    assert starts(config(10), config(20, microbatch_size=1)) == ([None] * 2, None)
    assert starts(config(10), config(20, schedule=WarmupStableDecaySchedule(decay=0.5))) == ([None] * 2, None)
    # The warm-up and its end are a fifth of the shorter run.
    for schedule in (CosineSchedule(), WarmupStableDecaySchedule(decay=0.99)):
        pair = [config(steps, schedule=schedule, warmup=1) for steps in (10, 20)]
        assert starts(*pair) == ([None] * 2, None)


def test_a_schedule_without_a_decay_shares_the_whole_shorter_run():
    constant = ConstantSchedule()
    assert starts(config(10, schedule=constant), config(20, schedule=constant)) == ([None, ("a", 10)], None)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (
            {"warmup": 2},
            {"warmup": 4},
            "optimizer.warmup resolves to 2 or 4 steps; give it in steps so that runs share steps",
        ),
        ({"max_rollbacks": 1}, {"max_rollbacks": 1}, "trainer.max_rollbacks is above 0, and a run that rolls back"),
    ],
)
def test_it_says_why_each_length_trains_in_full(first, second, wanted):
    found, hindrance = starts(config(10, **first), config(20, **second))
    assert found == [None, None]
    assert hindrance.startswith(f"each run trains in full: {wanted}") and "\n" not in hindrance


@pytest.mark.usefixtures("plugin_folder")
def test_a_plug_in_may_use_the_length_in_other_ways():
    optimizer = importlib.import_module("adan").AdanConfig(schedule=WSD, warmup=2, final_learning_rate=0.0)
    found, hindrance = starts(*(dataclasses.replace(config(steps), optimizer=optimizer) for steps in (10, 20)))
    assert found == [None, None]
    assert hindrance == (
        "each run trains in full: optimizer.type adan is from a plug-in, which may use the number of steps outside "
        "the schedule"
    )


@pytest.mark.parametrize("part", [None, 0.5])
def test_a_slow_average_that_warms_up_over_a_part_of_the_run(part):
    optimizer = AdEMAMixConfig(schedule=WSD, warmup=2, final_learning_rate=0.0, slow_warmup=part)
    found, hindrance = starts(*(dataclasses.replace(config(steps), optimizer=optimizer) for steps in (10, 20)))
    assert found == [None, None]
    assert hindrance == "each run trains in full: optimizer.slow_warmup is a fraction of the run; specify it in steps"
    optimizer = dataclasses.replace(optimizer, slow_warmup=4)
    found, hindrance = starts(*(dataclasses.replace(config(steps), optimizer=optimizer) for steps in (10, 20)))
    assert found[1] is not None and hindrance is None


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h", "adamw", "lion", "muon", "soap"])
def test_the_length_enters_the_optimizers_by_their_learning_rate_alone(name):
    """What sharing steps rests on."""
    given = OptimizerConfig.get_known_choices()[name]()
    short, long = (
        eqx.tree_at(lambda optimizer: optimizer.learning_rate, given.build(steps), 1.0) for steps in (1000, 2000)
    )
    assert eqx.tree_equal(short, long)


ARRAYS = {"model": {"weight": np.arange(6.0)}}


def shorter_run(folder: Path) -> Start:
    """A finished run of 10 steps, with a checkpoint after 9."""
    mine = config(10)
    write_run(folder, mine, step_lines(10))
    metadata = FACTS | {"config": {"model": {"vocab_rows": 7}, "trainer": {"num_train_steps": 10}}, "best": None}
    keep = checkpoint.Retention(5)
    checkpoint.save(folder / "checkpoints", 9, ARRAYS, run_id="short", metadata=metadata, retention=keep)
    return Start(folder, 9)


def longer_config(directory: Path) -> TrainConfig:
    return config(20, run_dir=str(directory))


def test_a_run_begins_as_if_it_had_saved_the_steps_itself(tmp_path):
    start, directory = shorter_run(tmp_path / "short"), tmp_path / "long"
    before = content(start.directory)
    begin(start, longer_config(directory), directory)
    assert content(start.directory) == before
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.jsonl", SHARED_STEPS
    ]  # fmt: skip
    assert load_config(RunDirectory(directory, "never").config_file) == longer_config(directory)
    assert (directory / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]
    assert steps_taken_over(directory) == 9 and steps_taken_over(start.directory) == 0
    restored = checkpoint.restore(directory / "checkpoints", ARRAYS, report=pytest.fail)
    assert restored.step == 9 and restored.run_id != "short"
    assert np.array_equal(restored.tree["model"]["weight"], ARRAYS["model"]["weight"])
    saved = restored.metadata["config"]
    assert (saved["model"], saved["trainer"]["num_train_steps"]) == ({"vocab_rows": 7}, 20)
    # What is there is never begun anew.
    there = content(directory)
    begin(dataclasses.replace(start, step=8), longer_config(directory), directory)
    assert content(directory) == there


@pytest.mark.parametrize("damage", ["chunk", "manifest", "missing"])
def test_without_a_whole_checkpoint_nothing_is_begun(damage, tmp_path):
    start, directory = shorter_run(tmp_path / "short"), tmp_path / "long"
    step = start.directory / "checkpoints" / "step-00000009"
    if damage == "missing":
        step.rename(step.with_name("step-00000008"))
    else:
        file = step / "manifest.json" if damage == "manifest" else next(step.rglob("c.*"))
        file.write_bytes(file.read_bytes()[:-1])
    begin(start, longer_config(directory), directory)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_a_beginning_that_was_killed_is_made_again(tmp_path):
    start, directory = shorter_run(tmp_path / "short"), tmp_path / "long"
    (tmp_path / "long.partial" / "checkpoints").mkdir(parents=True)
    begin(start, longer_config(directory), directory)
    assert steps_taken_over(directory) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "short"]


def test_the_jobs_of_a_study(tmp_path):
    """Also of one that was stopped after the shorter run, with and without its checkpoint, or in the longer one."""
    lines: list[str] = []
    short, long, other = config(10), config(20), TrainConfig(optimizer=SophiaGConfig())
    first, second, third = jobs_of([short, other, long], [short, other, long], tmp_path, lines.append)
    assert (first.config, second.config, third.config) == (short, other, long)
    assert (first.start, first.keep_step, third.keep_step) == (None, 9, None)
    assert third.start == Start(first.directory, 9) and (second.start, second.keep_step) == (None, None)
    assert lines == ["1 run will start from a shorter run's checkpoint, reusing 9 steps"]

    def remaining() -> Start | None:
        (job,) = jobs_of([short, long], [long], tmp_path, lines.append)
        return job.start

    assert remaining() is None and len(lines) == 1
    (first.directory / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert remaining() == third.start and len(lines) == 2
    (first.directory / "checkpoints" / "step-00000009").rmdir()
    third.directory.mkdir()
    (third.directory / SHARED_STEPS).write_text("9\n")
    assert remaining() == third.start
    # The longer one is done, so nothing need be kept for it.
    (job,) = jobs_of([short, long], [short], tmp_path, lines.append)
    assert job.keep_step is None


def test_a_run_without_record_and_checkpoint_begins_again(tmp_path):
    """A study that was killed left it so. A run at work stays as it is, and so does one with a checkpoint."""
    lines: list[str] = []
    lost, saved = TrainConfig(optimizer=SophiaGConfig()), config(10)
    for each in (lost, saved):
        write_run(job_directory(tmp_path, each), each)
    write_manifest(job_directory(tmp_path, saved) / "checkpoints", 10)
    directory = job_directory(tmp_path, lost)
    with lock(directory / LOCK_NAME):
        jobs_of([lost, saved], [lost, saved], tmp_path, lines.append)
    assert directory.exists() and not lines
    first, second = jobs_of([lost, saved], [lost, saved], tmp_path, lines.append)
    aside = f"{directory.name}.old"
    assert lines == [
        f"{directory} had neither a record nor a checkpoint; it was renamed to {aside}, and the run starts again"
    ]
    assert (tmp_path / aside / "metrics.jsonl").exists()
    assert first.directory == directory and not directory.exists() and second.directory.exists()
