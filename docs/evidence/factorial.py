"""Runs the factorial of PROTOCOL.md: tunes every cell of `config/studies/factorial.yaml` at every batch, by `compare`.

Start it in the repository's root with the options of `compare` that name the text:

    python docs/evidence/factorial.py --data.train FILE --data.validation FILE

Every decision follows from the records in `docs/evidence/factorial_BATCH/study.json` alone, so the same command
continues a study that was stopped. The points that it chose are in `config/studies/factorial_BATCH.yaml`.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import yaml

try:
    from sophia_levanter.studies.records import find, read_records
    from sophia_levanter.studies.study import plan, read_study
except ImportError:  # in the commit that PROTOCOL.md names
    from sophia_levanter.comparison.records import find, read_records
    from sophia_levanter.comparison.study import plan, read_study

STUDIES, EVIDENCE = Path("config/studies"), Path("docs/evidence")
RUNS = 6  # tuning runs of each cell, all with seed 0
FRESH_SEEDS = [1, 2]  # run at the best point
WINDOWS = 8  # of 128 tokens, in the unit of a batch
STEPS = {4: 1024, 64: 128, 16: 512, 1: 1024}
START = {64: 4, 16: 4, 1: 4}  # the batch whose best point is the starting point
FACTORS = {"rho": 2.0, "eps": 10.0}
CORE = ("parameters_second", "kronecker_second", "parameters_gnb", "kronecker_gnb")
HUTCHINSON = ("parameters_hutchinson", "kronecker_hutchinson")
POWER = ("parameters_second_power_1", "kronecker_second_power_1")
STAGES = [
    *((batch, CORE) for batch in (4, 64, 16, 1)),
    *((batch, CORE + HUTCHINSON) for batch in (4, 64, 16, 1)),
    *((batch, CORE + HUTCHINSON + POWER) for batch in (4, 64, 16)),
]
# From the best point so far, in the order in which they are tried: exponents of sqrt 2 in the learning rate, and of the
# factor in the damping. The last two keep learning_rate / rho.
MOVES = [(2, 0), (-2, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (2, 1), (-2, -1)]

Point = tuple[int, int]


def next_point(losses: dict[Point, float]) -> Point | None:
    """The point to run next, given the losses of the ones before; None after the last."""
    if not losses:
        return 0, 0
    if len(losses) == RUNS:
        return None
    best = best_of(losses)
    return next(p for move in MOVES if (p := (best[0] + move[0], best[1] + move[1])) not in losses)


def best_of(losses: dict[Point, float]) -> Point:
    """The point with the lowest loss, the earliest of equal ones."""
    return min(losses, key=lambda point: losses[point])


def settings_at(start: dict[str, float], point: Point) -> dict[str, float]:
    """The learning rate and the damping of a point, in that order; `start` is point (0, 0)."""
    (rate, first), (damping, second) = start.items()
    numbers = {rate: first * math.sqrt(2) ** point[0], damping: second * FACTORS[damping] ** point[1]}
    return {name: float(f"{number:.3g}") for name, number in numbers.items()}


def tune(batch: int, cells: tuple[str, ...], options: list[str]) -> dict[str, dict[str, float]]:
    """Does the runs of these cells at a batch size that have no record, and returns the best settings."""
    study = yaml.safe_load((STUDIES / "factorial.yaml").read_text())
    if batch in START:
        starts = tune(START[batch], cells, options)
    else:
        starts = {n: {k: float(v[0]) for k, v in study["arms"][n]["grid"]["optimizer"].items()} for n in cells}
    windows = batch * WINDOWS
    study["settings"]["trainer"] |= {"batch_size": windows, "microbatch_size": min(8, windows // 4)}
    study["tokens"] = STEPS[batch] * batch * 1024
    losses: dict[str, dict[Point, float]] = {name: {} for name in cells}
    while True:
        arms, asked = {}, {}
        for name in cells:
            point = next_point(losses[name])
            points = [*losses[name]] if point is None else [*losses[name], point]
            for number, tried in enumerate(points):
                arms[f"{name}_{number}"] = arm_at(study["arms"][name], settings_at(starts[name], tried), [0])
            if point is None:
                best = settings_at(starts[name], best_of(losses[name]))
                arms[f"{name}_fresh"] = arm_at(study["arms"][name], best, FRESH_SEEDS)
            else:
                asked[f"{name}_{len(losses[name])}"] = name, point
        whole = study | {"baseline": f"{cells[0]}_0", "arms": arms}
        found, missing = results(whole, batch)
        for arm, (name, point) in asked.items():
            if arm in found:
                losses[name][point] = found[arm]
        if not missing:
            if not asked:
                return {name: settings_at(starts[name], best_of(losses[name])) for name in cells}
        elif not asked.keys() & found.keys():
            compare(batch, options)


def arm_at(cell: dict, settings: dict[str, float], seeds: list[int]) -> dict:
    """An arm of one point of a cell."""
    return cell | {"grid": {"optimizer": {name: [value] for name, value in settings.items()}}, "seeds": seeds}


def results(study: dict, batch: int) -> tuple[dict[str, float], bool]:
    """The losses of the arms with records, and whether some have none; `compare` then finds the study file here."""
    name = f"factorial_{batch}"
    file = STUDIES / f".{name}.yaml"
    heading = "# Written by docs/evidence/factorial.py: the points that it chose.\n"
    # The copy by way of JSON shares no parts, which would become anchors.
    file.write_text(
        heading + yaml.safe_dump(json.loads(json.dumps(study)), sort_keys=False, default_flow_style=None, width=150)
    )
    runs, records = plan(read_study(file), {}), read_records(EVIDENCE / name / "study.json")
    of = [(run.arm, find(records, run.config)) for run in runs]
    losses = {arm: math.inf if record.loss is None else record.loss for arm, record in of if record is not None}
    missing = any(record is None for _, record in of)
    # A study that has all its records may be a part of the one that is there.
    file.replace(STUDIES / f"{name}.yaml") if missing else file.unlink()
    return losses, missing


def compare(batch: int, options: list[str]) -> None:
    """Does the runs of the study file that have no record."""
    name = f"factorial_{batch}"
    files = ["--config", str(STUDIES / f"{name}.yaml"), "--out", str(EVIDENCE / name)]
    status = subprocess.run([sys.executable, "-m", "sophia_levanter.commands.compare", *files, *options]).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(used.ru_utime + used.ru_stime) / 3600:.2f} core-hours since the start", flush=True)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    for batch, cells in STAGES:
        tune(batch, cells, sys.argv[1:])
