"""The report on runs: a self-contained HTML page, separate images, and text for a terminal."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sophia_levanter.config.build import flat
from sophia_levanter.errors import one_line
from sophia_levanter.files import write_atomically
from sophia_levanter.studies.comparability import NOTHING, Comparability, Row, configurations, facts
from sophia_levanter.studies.heat_maps import CAPTION, heat_map_png, heat_map_svg, statistics_of
from sophia_levanter.studies.panels import (
    ADVISED_WIN_RATES,
    AXES,
    BITS,
    STEPS,
    TRAINING,
    VALIDATION,
    Axis,
    Panel,
    curves_of,
    other_panels,
)
from sophia_levanter.studies.plots import png, sample_of_line, svg
from sophia_levanter.studies.report import at_the_edge, few_evaluations, unusual_win_rate
from sophia_levanter.studies.runs import Run
from sophia_levanter.tracking.console import show_age

RECENT_SECONDS = 86_400.0
IN_TERMINAL = ("run", "steps", "last validation loss", "bits per byte", "win rate", "tokens/s", "status")
SMALLEST_GRID = 3  # minimum number of runs in a grid
OF_OTHER_TOKENS = "Losses per token cannot be compared between tokenizers."


def write_page(runs: Sequence[Run], comparability: Comparability, page: Path) -> list[Path]:
    """Write the page, and images next to it whose names start with the name of the page.

    Args:
        runs: at least one run. Names must be distinct.
        comparability: the extent to which the losses of the runs are comparable.
        page: the path of the page.

    Returns:
        The paths of the files written, starting with the page.
    """
    files = {page: render(runs, comparability).encode(errors="replace")}
    for axis in axes_of(runs):
        suffix = "" if axis is STEPS else f"-{axis.key}"
        losses = [(panel, axis) for panel in loss_panels(comparability)]
        files[page.with_name(f"{page.stem}-loss{suffix}.png")] = png(losses, runs)
    for panel in other_panels(runs):
        files[page.with_name(f"{page.stem}-{panel.key}.png")] = png([(panel, STEPS)], runs)
    for number, run in enumerate(runs, start=1):
        if (found := statistics_of(run)) is not None:
            suffix = f"-{number}" if len(runs) > 1 else ""
            files[page.with_name(f"{page.stem}-statistics{suffix}.png")] = heat_map_png(found, run.name)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def in_lines(runs: Sequence[Run], comparability: Comparability) -> list[str]:
    """Return lines for a terminal: a table with the most important columns, followed by the notes."""
    chosen = [COLUMNS.index(name) for name in IN_TERMINAL]
    rows = [[_text(row[i]) for i in chosen] for row in headline(runs, comparability)]
    table = [[one_line(text) for text in row] for row in (IN_TERMINAL, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(chosen))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return lines + [one_line(f"NOTE: {note}") for note in notes(runs, comparability)]


def notes(runs: Sequence[Run], comparability: Comparability) -> list[str]:
    """Return notes for the reader about the limits of the comparison, and warnings about the settings of the runs."""
    return [*comparability.notes, *_cautions(runs, comparability)]


def _cautions(runs: Sequence[Run], comparability: Comparability) -> Iterator[str]:
    if comparability.same_tokenizer and comparability.same_text:
        yield from _edges(runs)
    for run in runs:
        rate = _last(run, "optim/win_rate")
        # Skip unfinished runs, whose win rate may still be 0, and runs in which a controller adjusts the win rate.
        if math.isfinite(rate) and run.is_finished and not _is_controlled(run):
            yield from unusual_win_rate(run.name, rate)
        trainer = run.config.trainer
        yield from few_evaluations(-(-trainer.num_train_steps // trainer.evaluation_interval), run.name)


def _is_controlled(run: Run) -> bool:
    optimizer = run.config.optimizer
    return getattr(optimizer, "target_win_rate", None) is not None or getattr(optimizer, "rho", None) == "auto"


def _edges(runs: Sequence[Run]) -> Iterator[str]:
    """Yield warnings about grids: groups of three or more finished runs that differ only in optimizer settings."""
    grids: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.is_finished and math.isfinite(_last(run, "validation/loss")):
            grids.setdefault((run.optimizer, _besides_optimizer(run)), []).append(run)
    for (optimizer, _), grid in grids.items():
        if len(grid) >= SMALLEST_GRID:
            points = [_optimizer_settings(run) for run in grid]
            best = min(zip(grid, points, strict=True), key=lambda pair: _last(pair[0], "validation/loss"))[1]
            yield from at_the_edge(optimizer, best, points)


def _optimizer_settings(run: Run) -> dict[str, Any]:
    """Return the optimizer settings, except for the final learning rate, which studies derive from the peak."""
    settings = {name: value for name, value in flat(run.config).items() if name.startswith("optimizer.")}
    return {name: value for name, value in settings.items() if name != "optimizer.final_learning_rate"}


def _besides_optimizer(run: Run) -> str:
    """Return the settings of the model, the batches and the length of the run as text."""
    names = ("num_train_steps", "batch_size", "batch_size_changes")
    return str([run.config.model, *(getattr(run.config.trainer, name) for name in names)])


def loss_panels(comparability: Comparability) -> list[Panel]:
    """Return the loss panels, in units that are comparable between the runs if possible."""
    validation = VALIDATION if comparability.same_tokenizer and comparability.same_text else BITS
    if comparability.same_tokenizer:
        return [validation, TRAINING]
    return [validation, replace(TRAINING, caption=f"{TRAINING.caption} {OF_OTHER_TOKENS}")]


def axes_of(runs: Sequence[Run]) -> list[Axis]:
    """Return the axes on which the positions of at least one run are known."""
    return [axis for axis in AXES if any(axis.positions(run, np.zeros(1)) is not None for run in runs)]


def render(runs: Sequence[Run], comparability: Comparability) -> str:
    """Render the page as HTML. See `write_page` for the arguments."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    differing, same = configurations(runs)
    return environment.get_template("page.html").render(
        names=[run.name for run in runs],
        samples=[Markup(sample_of_line(number)) for number in range(len(runs))],
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}, sophia_levanter {version('sophia-levanter')}",
        notes=notes(runs, comparability),
        columns=COLUMNS,
        rows=headline(runs, comparability),
        sets_and_tasks=sets_and_tasks(runs),
        all_axes=AXES,
        axes=axes_of(runs),
        steps=STEPS,
        losses=loss_panels(comparability),
        others=other_panels(runs),
        heat_maps=[(run.name, Markup(heat_map_svg(found))) for run in runs if (found := statistics_of(run))],
        heat_map_caption=CAPTION,
        names_in=lambda panel: ", ".join(run.name for run in runs if curves_of(panel, run)),
        picture=lambda panel, axis: Markup(svg(panel, runs, axis)),
        differing=differing,
        same=[(name, values[:1]) for name, values in same],
        facts=facts(runs),
    )


def _shown(value: object) -> object:
    """Convert a value to text for the page. Values that are already markup, such as images, are unchanged."""
    return value if isinstance(value, Markup) else one_line(value)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: the text to show.
        best: whether the value is the best in its column.
        remark: a word to show after the text; may be empty.
    """

    text: str
    best: bool = False
    remark: str = ""


# The columns of the table that `headline` fills.
COLUMNS = (
    "run",
    "status",
    "optimizer",
    "parameters",
    "steps",
    "tokens",
    "last validation loss",
    "best validation loss",
    "bits per byte",
    "win rate",
    "tokens/s",
    "MFU",
    "skipped steps",
)


def headline(runs: Sequence[Run], comparability: Comparability) -> list[list[Cell]]:
    """Return a row for each run, with a cell for each column in `COLUMNS`."""
    losses = [_last(run, "validation/loss") for run in runs]
    lowest = [_lowest(run) for run in runs]
    bits = [_last(run, "validation/bits_per_byte") for run in runs]
    compared = comparability.same_text and len(runs) > 1
    per_token = compared and comparability.same_tokenizer
    return [
        [
            Cell(run.name),
            Cell(status(run)),
            Cell(run.optimizer),
            Cell(NOTHING if run.parameters is None else short(run.parameters)),
            Cell(f"{run.steps_done:,} / {run.total_steps:,}"),
            Cell(short(float(run.tokens_at(np.array(run.steps_done))))),
            Cell(_decimals(losses[i]), best=per_token and _is_lowest(losses[i], losses)),
            Cell(_decimals(lowest[i]), best=per_token and _is_lowest(lowest[i], lowest)),
            Cell(_decimals(bits[i]), best=compared and _is_lowest(bits[i], bits)),
            _win_rate(run),
            Cell(_throughput(run)),
            Cell(_utilisation(run)),
            Cell(f"{_last(run, 'train/skipped_steps', 0.0):,.0f}"),
        ]
        for i, run in enumerate(runs)
    ]


def sets_and_tasks(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each named validation set and each task, with the last loss or score in each run."""
    logged = dict.fromkeys(name for run in runs for name in run.series)
    names = [name for name in logged if fnmatchcase(name, "validation/*/*") or fnmatchcase(name, "tasks/*")]
    return [(name, [_with_interval(run, name) for run in runs]) for name in names if not name.endswith("_interval")]


def _with_interval(run: Run, name: str) -> str:
    value, interval = _decimals(_last(run, name)), _last(run, f"{name}_interval")
    return f"{value} ± {interval:.4f}" if math.isfinite(interval) else value


def status(run: Run) -> str:
    """Describe whether a run has finished, diverged or stopped, or is still in progress."""
    if run.has_diverged:
        return "diverged" if run.is_finished else f"diverged at step {run.steps_done:,}"
    if run.is_finished:
        return "finished"
    if time.time() - run.written_at < RECENT_SECONDS:
        return f"at step {run.steps_done:,}, {show_age(run.written_at)}"
    return f"stopped at step {run.steps_done:,}"


def short(number: float) -> str:
    """Format a number with three digits and a unit: 860k, 1.56B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f}{unit}"
    return f"{number:,.0f}"


def _last(run: Run, name: str, otherwise: float = math.nan) -> float:
    return run.series[name].last if name in run.series else otherwise


def _lowest(run: Run) -> float:
    values = run.series["validation/loss"].values if "validation/loss" in run.series else np.array([])
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else math.nan


def _is_lowest(value: float, values: Sequence[float]) -> bool:
    finite = [other for other in values if math.isfinite(other)]
    # Compare the formatted values, so that values that look the same count as equal.
    return len(finite) > 1 and _decimals(value) == _decimals(min(finite))


def _decimals(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else NOTHING


def _win_rate(run: Run) -> Cell:
    rate = _last(run, "optim/win_rate")
    if not math.isfinite(rate):
        return Cell(NOTHING)
    low, high = ADVISED_WIN_RATES
    return Cell(f"{rate:.2f}", remark="low" if rate < low else "high" if rate > high else "")


def _throughput(run: Run) -> str:
    seconds = run.seconds_at(np.array(run.steps_done))
    return NOTHING if seconds is None else short(float(run.tokens_at(np.array(run.steps_done)) / seconds))


def _utilisation(run: Run) -> str:
    """Format the mean MFU over time: the model FLOPs of all steps divided by the peak FLOPs during that time."""
    if run.rates is None or "train/mfu" not in run.series:
        return NOTHING
    # Weight each step by its duration, because the product of MFU and duration is proportional to model FLOPs.
    shares = run.series["train/mfu"]
    steps, of_rates, of_shares = np.intersect1d(run.rates.steps, shares.steps, return_indices=True)
    seconds = np.diff(run.tokens_at(np.append(0, steps))) / run.rates.values[of_rates]
    share = np.sum(shares.values[of_shares] * seconds) / np.sum(seconds) if steps.size else math.nan
    return f"{share:.1%}" if math.isfinite(share) else NOTHING


def _text(cell: Cell) -> str:
    return f"{cell.text} {cell.remark}".rstrip() + (" *" if cell.best else "")
