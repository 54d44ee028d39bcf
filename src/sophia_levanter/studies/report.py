"""The report on a study: a Markdown page with tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia_levanter.errors import InputError, counted, one_line
from sophia_levanter.studies.records import Record, find
from sophia_levanter.studies.results import (
    Cell,
    SpeedUp,
    best,
    collect,
    flops_per_token,
    lengths,
    seconds_per_step,
    shared_steps,
    speed_ups,
    steps_trained,
    tokens_per_step,
)
from sophia_levanter.studies.study import Arm, PlannedRun, Study, descend
from sophia_levanter.tracking.console import show_duration

REPORT = "report.md"
# A win rate outside this range means that rho is unsuitable, because almost all or almost no coordinates are clipped.
WIN_RATES = (0.1, 0.9)
FEWEST_EVALUATIONS = 5


def write_report(study: Study, runs: Sequence[PlannedRun], records: Sequence[Record], out: Path) -> str:
    """Write `report.md` and the plots to a directory, and return the text of the report.

    Args:
        study: the study.
        runs: the runs of the study.
        records: the results, which may include results of runs that are no longer part of the study.
        out: the output directory.

    Raises:
        InputError: if matplotlib is not installed.
    """
    cells = collect(runs, records)
    if not cells:
        return f"# {one_line(study.name)}\n\nNo run has finished yet."
    missing = sum(find(records, run.config) is None for run in runs)
    summary = _summary(cells, records, missing)
    parts = [f"# {one_line(study.name)}", summary, "## Best point of each arm", _best_table(cells)]
    if study.baseline is not None:
        parts += [f"## Speed-up over {study.baseline}", _speed_table(study.baseline, cells)]
    parts += ["## All points", _all_table(cells)]
    if cautions := [*_cautions(study, cells), *few_evaluations(study.evaluations)]:
        parts.insert(2, "\n".join(f"- **{caution}**" for caution in cautions))
    try:
        from sophia_levanter.studies.plots import study_pictures
    except ImportError:
        raise InputError("plots require matplotlib; install sophia-levanter[compare]") from None
    for name, picture in study_pictures(cells).items():
        (out / name).write_bytes(picture)
        parts.append(f"![{name}]({name})")
    text = "\n\n".join(parts) + "\n"
    (out / REPORT).write_text(text, encoding="utf-8")
    return text


def _summary(cells: Sequence[Cell], records: Sequence[Record], missing: int) -> str:
    diverged = sum(record.loss is None for record in records)
    # Older records of runs that diverged before their first checkpoint lack both the model size and the data digest.
    sizes = ", ".join(f"{n:,}" for n in sorted({record.parameters for record in records} - {0}))
    # A mixture has no digest of its own.
    texts = len({json.dumps(data.get("digest", data)) for record in records if (data := record.facts.get("data"))})
    lines = [f"{counted(len(records), 'run')} ended; {diverged} diverged. Parameters: {sizes}."]
    if missing:
        lines.append(
            f"**{counted(missing, 'planned run')} failed or did not end yet, which may change the best points.**"
        )
    others = len(records) - len({id(record) for cell in cells for record in cell.records.values()})
    if others:
        lines.append(f"{others} of them {'is' if others == 1 else 'are'} not part of the current study.")
    if shared := sum(map(shared_steps, records)):
        lines.append(_budget(records, shared))
    if texts > 1:
        lines.append(f"**The runs used {texts} different training texts.**")
    return " ".join(lines)


def _budget(records: Sequence[Record], shared: int) -> str:
    """Describe the total amount of training in a study whose runs share steps."""
    trained = {id(record): steps_trained(record) for record in records}
    tokens = sum(trained[id(record)] * tokens_per_step(record) for record in records)
    seconds = sum(trained[id(record)] * seconds_per_step(record) for record in records)
    return (
        f"The runs trained for {sum(trained.values()):,} steps ({tokens:,} tokens, {show_duration(seconds)} of "
        f"training time); longer runs reused another {shared:,} steps from shorter runs, and each step is counted once."
    )


def _cautions(study: Study, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield warnings about the best point of each arm at its longest schedule."""
    searched = {arm.name: arm for arm in study.arms if arm.search_runs is not None and arm.grid}
    for arm in dict.fromkeys(cell.arm for cell in cells):
        tokens = lengths(cells, arm)[-1]
        cell = best(cells, arm, tokens)
        assert cell is not None
        if arm in searched:
            for length in lengths(cells, arm):
                yield from _search_cautions(searched[arm], [c for c in cells if c.arm == arm and c.tokens == length])
        else:
            yield from at_the_edge(arm, cell.point, [c.point for c in cells if c.arm == arm and c.tokens == tokens])
        rate = mean_win_rate(cell)
        if rate is not None:
            yield from unusual_win_rate(arm, rate)


def _search_cautions(arm: Arm, tried: Sequence[Cell]) -> Iterator[str]:
    """Yield warnings about a search at one length that has not ended, ended early, or ended at the edge of the grid."""
    name = f"{arm.name} at {tried[0].tokens:,} tokens"
    grid = {field: [setting.value for setting in values] for field, values in arm.grid.items()}
    shape = [len(values) for values in grid.values()]
    losses = {
        tuple(values.index(cell.point[field]) for field, values in grid.items()): cell.tuning_loss for cell in tried
    }
    same = [field for i, field in enumerate(grid) if shape[i] > 1 and len({place[i] for place in losses}) == 1]
    best = min(tried, key=lambda cell: cell.tuning_loss)
    varied = {field: value for field, value in best.point.items() if field not in same}
    yield from at_the_edge(name, varied, [{field: value} for field in grid for value in grid[field]])
    if descend(losses, shape, arm.search_runs or 0):
        yield f"{name}: the search has not ended, because a run is missing."
    elif descend(losses, shape, len(losses) + 1):
        not_varied = f" and did not vary {', '.join(map(_last, same))}" if same else ""
        runs = counted(len(losses), "run")
        yield f"{name}: the search used all {runs} before it reached a minimum{not_varied}; increase search_runs."
    if best.seeds == [best.tuning_seed]:
        yield f"{name}: the reported loss also selected the best point, so it is optimistic; add seeds."


def at_the_edge(name: str, best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a warning for each numeric setting whose value at the best point is the smallest or largest one tried."""
    for field, value in best.items():
        if type(value) not in (int, float):
            continue
        values = [point[field] for point in tried if type(point.get(field)) in (int, float)]
        if min(values) < max(values) and value in (min(values), max(values)):
            further = "smaller" if value == min(values) else "larger"
            yield f"{name}: the best {_last(field)}, {_short(value)}, is at the edge of its grid; try {further} values."


def unusual_win_rate(name: str, rate: float) -> Iterator[str]:
    """Yield a warning if the win rate shows that rho is unsuitable."""
    low, high = WIN_RATES
    if not low <= rate <= high:
        remedy = "a larger rho" if rate < low else "a smaller rho"
        yield f"{name}: the last win rate is {rate:.2f}; typical values are {low:g} to {high:g}, so try {remedy}."


def few_evaluations(count: int, where: str = "a run") -> Iterator[str]:
    """Yield a warning if there are too few validation losses to plot a curve."""
    if count < FEWEST_EVALUATIONS:
        losses = f"{counted(count, 'validation loss')} in {where} {'is' if count == 1 else 'are'}"
        yield f"{losses} too few for a curve; use {FEWEST_EVALUATIONS} or more."


def _last(field: str) -> str:
    """Return the name of a field without its section."""
    return field.split(".")[-1]


def _best_table(cells: Sequence[Cell]) -> str:
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        for tokens in lengths(cells, arm):
            cell = best(cells, arm, tokens)
            assert cell is not None
            tried = [c for c in cells if c.arm == arm and c.tokens == tokens]
            rows.append([arm, f"{tokens:,}", str(len(tried)), _point(cell), _loss(cell), str(len(cell.seeds))])
    return _table(["arm", "tokens", "points tried", "best point", "validation loss", "seeds"], rows)


def _speed_table(baseline: str, cells: Sequence[Cell]) -> str:
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in cells if cell.arm != baseline):
        for found in speed_ups(cells, arm, baseline):
            factors = [_factor(found, cost) for cost in (1.0, *_cost_ratios(cells, arm, baseline))]
            rows.append([arm, f"{found.tokens:,}", *factors, _interval(found)])
    note = (
        "s is the length of the baseline's whole schedule divided by the length of the arm's whole schedule that ends "
        "at the same loss, measured in tokens, FLOPs and time. The interval, in tokens, allows for seeds (a t "
        "distribution) and for luck in tuning (a bootstrap over the points tried). `<` and `>` mark bounds: the value "
        "lies beyond the lengths tried. Runs may have shared the machine with other work, which affects the time; "
        "`tests/benchmarks/peers.py` measures the cost of a step."
    )
    return note + "\n\n" + _table(["arm", "baseline tokens", "s", "s in FLOPs", "s in time", "95% interval"], rows)


def _cost_ratios(cells: Sequence[Cell], arm: str, baseline: str) -> tuple[float, float]:
    """Return the ratios of FLOPs per token and seconds per token between the arm and the baseline."""

    def record(name: str) -> Record:
        cell = best(cells, name, lengths(cells, name)[-1])
        assert cell is not None
        return next(iter(cell.records.values()))

    ours, theirs = record(arm), record(baseline)
    seconds = [seconds_per_step(r) / tokens_per_step(r) for r in (ours, theirs)]
    return flops_per_token(ours) / flops_per_token(theirs), seconds[0] / seconds[1] if all(seconds) else math.nan


def _factor(found: SpeedUp, cost: float) -> str:
    return f"{found.bound}{found.factor / cost:.2f}"


def _interval(found: SpeedUp) -> str:
    if found.low is None:
        return "–"
    low, high = f"{found.low_bound}{found.low:.2f}", f"{found.high_bound}{found.high:.2f}"
    return f"{low}–{high} ({found.seeds} seeds)"


def _all_table(cells: Sequence[Cell]) -> str:
    # Points of a search are compared by the seed that all of them have.
    ordered = sorted(cells, key=lambda cell: (cell.tokens, cell.tuning_loss))
    rows = [
        [c.arm, f"{c.tokens:,}", _point(c), _tuning_loss(c), _seeds(c), str(c.diverged), _win_rate(c)] for c in ordered
    ]
    return _table(["arm", "tokens", "point", "validation loss", "seeds", "diverged", "final win rate"], rows)


def _point(cell: Cell) -> str:
    return ", ".join(f"{_last(name)} {_short(value)}" for name, value in cell.point.items()) or "–"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _loss(cell: Cell) -> str:
    if not math.isfinite(cell.mean):
        return "diverged"
    return f"{cell.mean:.4f}" + ("" if cell.spread is None else f" ± {cell.spread:.4f}")


def _tuning_loss(cell: Cell) -> str:
    if cell.tuning_seed is None:
        return _loss(cell)
    return f"{cell.tuning_loss:.4f}" if math.isfinite(cell.tuning_loss) else "diverged"


def _seeds(cell: Cell) -> str:
    return str(len(cell.seeds)) if cell.tuning_seed is None else f"seed {cell.tuning_seed}"


def _win_rate(cell: Cell) -> str:
    rate = mean_win_rate(cell)
    return "–" if rate is None else f"{rate:.2f}"


def mean_win_rate(cell: Cell) -> float | None:
    """Return the mean final win rate over the seeds that count, or None if no run has a win rate."""
    rates = [curve[-1][1] for seed in cell.seeds if (curve := cell.records[seed].win_rate)]
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[one_line(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
