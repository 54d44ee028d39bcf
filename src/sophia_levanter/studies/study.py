"""Study files, which specify the training runs to compare. This module does not import jax."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import build_config
from sophia_levanter.config.files import Layer, Setting, read_layers, show_value
from sophia_levanter.config.run import with_steps
from sophia_levanter.errors import InputError, counted, one_line, shortened

ARM_FIELDS = ("config", "settings", "grid", "search_runs", "tokens", "seeds", "warmup_fraction", "final_fraction")
STUDY_FIELDS = (*(name for name in ARM_FIELDS if name != "grid"), "evaluations", "baseline", "arms")
LONGEST_NAME = 60  # maximum length of an arm's name, for tables and legends
SECTIONS = ("settings", "grid")
# Settings of a run that the study determines, each with the field or option of the study to use instead.
OWN_FIELDS = {
    "trainer.num_train_steps": "tokens",
    "trainer.seed": "seeds",
    "trainer.evaluate_every": "evaluations",
    "trainer.checkpoint_every": "evaluations",
    "trainer.run_dir": "--out",
}
# Placeholder until the number of steps is known. It exceeds any warm-up.
_MANY_STEPS = {"trainer.num_train_steps": Setting(2**31 - 1)}


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: an optimizer or another variant, with the grid of settings to try.

    Attributes:
        name: the name of the arm in tables and plots.
        layers: settings for the runs of the arm. Later layers override earlier ones.
        grid: the values to try for each field. All combinations are trained, unless `search_runs` is set.
        tokens: the schedule lengths, in training tokens.
        seeds: the seeds. Each point and length is trained with every seed, unless `search_runs` is set.
        search_runs: the maximum number of points that coordinate descent trains at each length with the first seed. The
            other seeds are trained at the best point only. None to train the whole grid.
    """

    name: str
    layers: tuple[Layer, ...] = ()
    grid: dict[str, list[Setting]] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    search_runs: int | None = None


@dataclass(frozen=True)
class Study:
    """A parsed study file.

    Attributes:
        name: the name of the study file without its suffix.
        arms: the arms to compare.
        baseline: the name of the arm with which the others are compared, or None.
        evaluations: number of evaluations in each run, including the final one.
    """

    name: str
    arms: tuple[Arm, ...]
    baseline: str | None
    evaluations: int


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        arm: the name of the arm.
        point: the value of each field in the grid for this run.
        tokens: the requested schedule length in training tokens. It is rounded to a whole number of steps.
        seed: seed for the weights, data order and samples.
        config: the complete configuration, without a run directory.
        tuning: whether coordinate descent selects the arm's best point by this run.
    """

    arm: str
    point: dict[str, Any]
    tokens: int
    seed: int
    config: TrainConfig
    tuning: bool = False


Place = tuple[int, ...]  # a point of a grid: for each field, the index of its value
LossOf = Callable[[TrainConfig], float | None]


def read_study(path: Path) -> Study:
    """Read a study file. Like other configuration files, it may list base files under `defaults:`.

    Raises:
        InputError: if a file is missing or is not strict YAML, a key is unknown, or a value is invalid.
    """
    merged: Layer = {}
    for layer in read_layers(path):
        merged |= layer
    common = {key: setting for key, setting in merged.items() if not key.startswith("arms.")}
    for key, setting in common.items():
        _check_known(key, setting, STUDY_FIELDS, "")
    names = dict.fromkeys(key.split(".")[1] for key in merged if key.startswith("arms."))
    if "" in names:
        raise InputError(f"{path}: an arm has an empty name")
    for name in names:
        if name != shortened(one_line(name), LONGEST_NAME):
            shown = shortened(repr(name), LONGEST_NAME)
            raise InputError(
                f"{path}: arms contains {shown}; a name may have at most {LONGEST_NAME} printable characters"
            )
    if not names:
        raise InputError(f"{path}: arms is missing; list the arms to compare, each with its config, settings and grid")
    arms = tuple(_arm(name, _below(f"arms.{name}.", merged), common, path) for name in names)
    baseline = common.get("baseline", Setting(None)).value
    if baseline is not None and not (isinstance(baseline, str) and baseline in names):
        raise InputError(f"{path}: baseline is {show_value(baseline)}; it must be one of the arms {', '.join(names)}")
    return Study(path.stem, arms, baseline, _int("evaluations", common.get("evaluations", Setting(5, path))))


def plan(study: Study, overrides: Layer, loss_of: LossOf = lambda _: None) -> list[PlannedRun]:
    """Return all runs of a study, ordered by seed and then by schedule length.

    In an arm with `search_runs`, these are the points tried so far and the next ones, which can be trained in parallel.
    When they are done, plan again.

    Args:
        study: the study.
        overrides: settings for all runs, which take precedence over all other settings.
        loss_of: returns the final validation loss of a completed run, infinite if it diverged, and None for other runs.

    Raises:
        InputError: if the configuration of a run is invalid. The message names the arm.
    """
    _check_not_own("--", overrides)
    runs = [run for arm in study.arms for run in _runs_of(arm, overrides, study.evaluations, loss_of)]
    seeds = list(dict.fromkeys(seed for arm in study.arms for seed in arm.seeds))
    return sorted(runs, key=lambda run: (seeds.index(run.seed), run.tokens))


def _runs_of(arm: Arm, overrides: Layer, evaluations: int, loss_of: LossOf) -> Iterator[PlannedRun]:
    def run(place: Place, tokens: int, seed: int, *, tuning: bool = False) -> PlannedRun:
        point = {name: values[index] for (name, values), index in zip(arm.grid.items(), place, strict=True)}
        try:
            config = build_config([*arm.layers, point], overrides | _MANY_STEPS)
            config = _with_schedule(config, tokens, seed, evaluations)
        except InputError as error:
            raise InputError(f"arm {arm.name}: {error}") from None
        return PlannedRun(arm.name, {name: value.value for name, value in point.items()}, tokens, seed, config, tuning)

    if overridden := [name for name in arm.grid if name in overrides]:
        raise InputError(f"arm {arm.name}: --{overridden[0]} overrides a field of the grid; remove it from one of them")
    shape = [len(values) for values in arm.grid.values()]
    if arm.search_runs is None or max(shape, default=1) == 1:
        for place in itertools.product(*map(range, shape)):
            yield from (run(place, tokens, seed) for tokens, seed in itertools.product(arm.tokens, arm.seeds))
        return
    middle = _middle(shape)
    for i, size in enumerate(shape):  # check all values now, because the search may not reach them for hours
        for index in range(size):
            run((*middle[:i], index, *middle[i + 1 :]), min(arm.tokens), arm.seeds[0])
    for tokens in arm.tokens:
        losses: dict[Place, float] = {}
        next_places = [middle]
        while next_places:
            runs = {place: run(place, tokens, arm.seeds[0], tuning=True) for place in next_places}
            yield from runs.values()
            losses |= {place: loss for place in runs if (loss := loss_of(runs[place].config)) is not None}
            if not losses.keys() >= runs.keys():
                break  # plan again when these runs are done
            next_places = descend(losses, shape, arm.search_runs)
        else:
            best = min(losses, key=losses.__getitem__)
            if math.isfinite(losses[best]):
                yield from (run(best, tokens, seed) for seed in arm.seeds[1:])


def _middle(shape: Sequence[int]) -> Place:
    """Return the place at which coordinate descent starts."""
    return tuple((size - 1) // 2 for size in shape)


def descend(losses: dict[Place, float], shape: Sequence[int], runs: int) -> list[Place]:
    """Return the next points that coordinate descent tries, or nothing at a local minimum and after `runs` points.

    These are the untried neighbors of the best point in one field. Fields with fewer values tried so far come first.

    Args:
        losses: the losses at the points tried so far, at least one. Infinite values are allowed.
        shape: the number of values of each field.
        runs: the maximum number of points to try.
    """
    best = min(losses, key=losses.__getitem__)
    for i in sorted(range(len(shape)), key=lambda i: len({place[i] for place in losses})):
        neighbors = [(*best[:i], best[i] + step, *best[i + 1 :]) for step in (1, -1) if 0 <= best[i] + step < shape[i]]
        if untried := [place for place in neighbors if place not in losses]:
            return untried[: max(runs - len(losses), 0)]
    return []


def _with_schedule(config: TrainConfig, tokens: int, seed: int, evaluations: int) -> TrainConfig:
    if config.trainer.batch_size_changes:
        raise InputError("trainer.batch_size_changes is set, but the runs in a study have a fixed batch size; unset it")
    steps = round(Fraction(tokens, config.trainer.batch_size * config.model.seq_len))
    if steps < evaluations:
        raise InputError(
            f"tokens is {tokens}, which is {counted(steps, 'step')}; "
            f"use at least one step for each of the {evaluations} evaluations"
        )
    every = -(-steps // evaluations)
    trainer = dataclasses.replace(
        config.trainer,
        num_train_steps=steps,
        seed=seed,
        evaluate_every=every,
        checkpoint_every=every,
        keep_checkpoints=1,
        sample_tokens=0,
        run_dir=None,
    )
    return with_steps(dataclasses.replace(config, trainer=trainer))


def _arm(name: str, own: Layer, common: Layer, path: Path) -> Arm:
    if not own:
        raise InputError(f"{path}: arms.{name} must be a mapping with config, settings or grid")
    for key, setting in own.items():
        _check_known(key, setting, ARM_FIELDS, f"arms.{name}.")
    _check_not_own("settings.", _below("settings.", common))
    for section in SECTIONS:
        _check_not_own(f"arms.{name}.{section}.", _below(f"{section}.", own))
    fields = {key: value for key, value in (common | own).items() if key.split(".")[0] not in ("config", *SECTIONS)}
    if "tokens" not in fields:
        raise InputError(f"{path}: tokens is missing; specify the schedule lengths in training tokens")
    shared = _below("settings.", common)
    schedule = {"optimizer.final_learning_rate": shared.get("optimizer.final_learning_rate", Setting(None))}
    for key, (path_of_setting, default) in _FRACTIONS.items():
        given = fields.get(key)
        found = shared.get(path_of_setting, Setting(default)) if given is None else _fraction(key, given)
        schedule[path_of_setting] = found
    search_runs = fields.get("search_runs", Setting(None))
    if search_runs.value is not None:
        _check_ordered(name, _below("grid.", own))
    # `schedule` overrides the schedules in configuration files, which are designed for a single run length.
    layers = [*_config_layers(common), shared, *_config_layers(own), schedule, _below("settings.", own)]
    return Arm(
        name,
        tuple(layers),
        {key: _grid_values(name, key, value) for key, value in _below("grid.", own).items()},
        tuple(_ints("tokens", fields["tokens"], low=1)),
        tuple(_ints("seeds", fields["seeds"])) if "seeds" in fields else (0,),
        None if search_runs.value is None else _int("search_runs", search_runs),
    )


# Fields of an arm or a study, each with the setting that it determines and the default of that setting.
_FRACTIONS = {"warmup_fraction": ("optimizer.warmup", 0.1), "final_fraction": ("optimizer.final_fraction", 0.05)}


def _below(prefix: str, layer: Layer) -> Layer:
    return {key.removeprefix(prefix): value for key, value in layer.items() if key.startswith(prefix)}


def _check_known(key: str, setting: Setting, fields: Sequence[str], prefix: str) -> None:
    name, _, rest = key.partition(".")
    if name not in fields or (rest and name not in SECTIONS):
        raise InputError(f"{setting.prefix}unknown key '{prefix}{key}'; valid fields are {', '.join(fields)}")
    if name in (*SECTIONS, "arms") and not rest and setting.value not in (None, {}):
        raise InputError(f"{setting.prefix}{prefix}{key} is {show_value(setting.value)}; it must be a mapping")


def _check_not_own(prefix: str, layer: Layer) -> None:
    for key, setting in layer.items():
        if key in OWN_FIELDS:
            raise InputError(f"{setting.prefix}{prefix}{key} has no effect in a study; use {OWN_FIELDS[key]} instead")


def _config_layers(layer: Layer) -> list[Layer]:
    if "config" not in layer:
        return []
    setting = layer["config"]
    names = setting.value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{setting.prefix}config is {show_value(names)}; it must be a list of file names")
    assert setting.file is not None
    try:
        return [found for name in names for found in read_layers(setting.file.parent / name)]
    except InputError as error:
        raise InputError(f"{setting.prefix}config: {error}") from None


def _grid_values(arm: str, key: str, setting: Setting) -> list[Setting]:
    if not isinstance(setting.value, list) or not setting.value:
        shown = show_value(setting.value)
        raise InputError(f"{setting.prefix}arms.{arm}.grid.{key} is {shown}; it must be a list of values to try")
    if any(setting.value.count(value) > 1 for value in setting.value):
        raise InputError(f"{setting.prefix}arms.{arm}.grid.{key} contains duplicates; list each value once")
    return [Setting(value, setting.file) for value in setting.value]


def _check_ordered(arm: str, grid: Layer) -> None:
    """Check that the numbers in a grid are in order, because coordinate descent moves between neighbors."""
    for key, setting in grid.items():
        values: Any = setting.value
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if numbers and values not in (sorted(values), sorted(values, reverse=True)):
            raise InputError(
                f"{setting.prefix}arms.{arm}.grid.{key} is not in order; with search_runs, list numbers in ascending "
                "or descending order"
            )


def _int(name: str, setting: Setting) -> int:
    value = setting.value
    if type(value) is not int:
        raise InputError(f"{setting.prefix}{name} is {show_value(value)}; it must be an integer")
    if value < 1:
        raise InputError(f"{setting.prefix}{name} is {value}; it must be at least 1")
    return value


def _ints(name: str, setting: Setting, low: int | None = None) -> list[int]:
    given: list[Any] = setting.value if isinstance(setting.value, list) else [setting.value]
    values = [int(value) if type(value) is float and value.is_integer() else value for value in given]
    for value in values:
        if type(value) is not int:
            raise InputError(f"{setting.prefix}{name} contains {show_value(value)}; it must be a list of integers")
    if not values:
        raise InputError(f"{setting.prefix}{name} is an empty list; specify at least one value")
    if len(set(values)) < len(values):
        raise InputError(f"{setting.prefix}{name} is {values}; it must not contain duplicates")
    if low is not None and min(values) < low:
        raise InputError(f"{setting.prefix}{name} contains {min(values)}; it must be at least {low}")
    return values


def _fraction(name: str, setting: Setting) -> Setting:
    value = setting.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{setting.prefix}{name} is {show_value(value)}; it must be between 0 and 1")
    return Setting(float(value), setting.file)
