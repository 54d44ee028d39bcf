"""The panels of a report with their captions, and the horizontal axes of the curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from fnmatch import fnmatchcase

import numpy as np

from sophia_levanter.config.registries import BUILT_IN
from sophia_levanter.studies.runs import Run, Series

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
COUNTS = ((1.0, ""), (1e3, "thousands"), (1e6, "millions"), (1e9, "billions"), (1e12, "trillions"))
FLOPS = ((1.0, ""), (1e9, "10⁹"), (1e12, "10¹²"), (1e15, "10¹⁵"), (1e18, "10¹⁸"), (1e21, "10²¹"), (1e24, "10²⁴"))
TIMES = ((1.0, "seconds"), (MINUTE, "minutes"), (HOUR, "hours"), (DAY, "days"))
ADVISED_WIN_RATES = (0.1, 0.5)  # from the README of the authors' code
LEAST = 2.0  # a unit is used if the longest run spans at least this many units


class Kind(Enum):
    """How a curve is drawn: with markers, as a plain line, or as a smoothed line over a faint one."""

    POINTS = auto()
    LINE = auto()
    SMOOTHED = auto()


@dataclass(frozen=True)
class Panel:
    """One plot in a report.

    Attributes:
        key: the panel's name in file names.
        title: the title above the panel.
        series: the name of the series in metrics.jsonl, or a pattern with * for several curves.
        label: the label of the vertical axis.
        caption: an explanation in one or two sentences.
        kind: how the curves are drawn.
        limits: limits of the vertical axis; if None, they are chosen to fit the curves.
        from_zero: whether the vertical axis starts at 0.
        may_be_logarithmic: whether to use a logarithmic vertical axis if the values are far apart.
    """

    key: str
    title: str
    series: str
    label: str
    caption: str
    kind: Kind = Kind.SMOOTHED
    limits: tuple[float, float] | None = None
    from_zero: bool = False
    may_be_logarithmic: bool = False


VALIDATION = Panel(
    "validation",
    "Validation loss",
    "validation/loss",
    "validation loss (nats per token)",
    "On held-out text. Lower is better.",
    Kind.POINTS,
)
BITS = Panel(
    "validation",
    "Validation, bits per byte",
    "validation/bits_per_byte",
    "validation loss (bits per byte of text)",
    "On held-out text, independent of the tokenizer. Lower is better.",
    Kind.POINTS,
)
TRAINING = Panel(
    "training",
    "Training loss",
    "train/loss",
    "training loss (nats per token)",
    "The loss on each step's batch, before the update (faint), and smoothed over 5% of the curve (bold).",
)
WIN_RATE = Panel(
    "win_rate",
    "Win rate",
    "optim/win_rate",
    "fraction of unclipped coordinates",
    "The fraction of coordinates whose step is not clipped. The authors recommend 0.1 to 0.5 (gray). Lower values are "
    "close to sign descent; a larger rho raises the win rate.",
    Kind.LINE,
    limits=(0.0, 1.0),
)
OTHERS = (
    Panel(
        "validation_sets",
        "Validation sets",
        "validation/*/loss",
        "validation loss (nats per token)",
        "The loss on each named set.",
        Kind.POINTS,
    ),
    Panel(
        "validation_sets_bits",
        "Validation sets, bits per byte",
        "validation/*/bits_per_byte",
        "validation loss (bits per byte of text)",
        "The loss on each named set, in bits per byte of text.",
        Kind.POINTS,
    ),
    Panel("tasks", "Tasks", "tasks/*/*accuracy", "accuracy", "The fraction of correct answers.", Kind.POINTS),
    WIN_RATE,
    Panel(
        "rho",
        "rho",
        "optim/rho",
        "rho",
        "The scale of the curvature, adjusted to control the win rate.",
        Kind.LINE,
        may_be_logarithmic=True,
    ),
    Panel(
        "curvature_norm",
        "Curvature norm",
        "optim/curvature_norm",
        "norm of h",
        "The norm of h, the estimate of the Hessian's diagonal. It should level off without collapsing.",
        Kind.LINE,
        may_be_logarithmic=True,
    ),
    Panel(
        "curvature_nonpositive",
        "Non-positive curvature",
        "optim/curvature_nonpositive",
        "fraction of h ≤ 0",
        "The fraction of coordinates without positive curvature; their steps are clipped.",
        Kind.LINE,
        from_zero=True,
    ),
    Panel(
        "momentum_norm",
        "Momentum norm",
        "optim/momentum_norm",
        "norm of m",
        "The norm of m, the running mean of the gradients.",
        Kind.LINE,
        may_be_logarithmic=True,
    ),
    Panel(
        "gradient_norm",
        "Gradient norm",
        "train/grad_norm",
        "norm of the gradient",
        "The gradient norm before clipping to trainer.max_grad_norm. Spikes are worth a look.",
        may_be_logarithmic=True,
    ),
    Panel("learning_rate", "Learning rate", "train/learning_rate", "learning rate", "", Kind.LINE, from_zero=True),
    Panel(
        "skipped_steps",
        "Skipped steps",
        "train/skipped_steps",
        "steps skipped so far",
        "Steps skipped because of a non-finite loss or gradient or, with trainer.loss_spike_factor, a loss spike.",
        Kind.LINE,
        from_zero=True,
    ),
    Panel(
        "throughput",
        "Throughput",
        "train/tokens_per_second",
        "tokens per second",
        "Summed over all devices. Steps that refresh the curvature are slower.",
        from_zero=True,
    ),
)


def other_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels for which the runs have data, except the loss panels. Registered metrics come last."""
    sections = dict.fromkeys(name.partition("/")[0] for run in runs for name in run.series if "/" in name)
    metrics = [
        Panel(f"metric-{name}", name, f"{name}/*", name, "", Kind.LINE, may_be_logarithmic=True)
        for name in sections
        if name.isidentifier() and name not in BUILT_IN
    ]
    panels = [_with_key(panel, runs) if "*" in panel.series else panel for panel in (*OTHERS, *metrics)]
    return [panel for panel in panels if any(_tells(panel, run) for run in runs)]


def _with_key(panel: Panel, runs: Sequence[Run]) -> Panel:
    """Add the names of the curves to the caption of the panel if there are several."""
    labels = curve_labels(panel, runs).values()
    shown = f"{panel.caption} From lightest to darkest: {', '.join(labels)}.".lstrip()
    return replace(panel, caption=shown) if len(labels) > 1 else panel


def curve_labels(panel: Panel, runs: Sequence[Run]) -> dict[str, str]:
    """Return the label of each series in a panel (the text matched by `*`), keyed by its name in metrics.jsonl."""
    if "*" not in panel.series:
        return {panel.series: ""} if any(panel.series in run.series for run in runs) else {}
    before, _, after = panel.series.partition("*")
    names = dict.fromkeys(name for run in runs for name in run.series if fnmatchcase(name, panel.series))
    return {name: name.removeprefix(before).removesuffix(after) for name in names}


def curves_of(panel: Panel, run: Run) -> list[Series]:
    """Return the series of a run that are shown in a panel."""
    return [run.series[name] for name in curve_labels(panel, [run])]


def _tells(panel: Panel, run: Run) -> bool:
    curves = [series for series in curves_of(panel, run) if np.isfinite(series.values).any()]
    if panel.key == "rho":
        return any(np.unique(series.values).size > 1 for series in curves)
    return any(panel.key != "skipped_steps" or series.last > 0 for series in curves)


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Attributes:
        key: the name of the axis in file names and on the page.
        title: the text of the button that selects the axis.
        label: the label of the axis.
        units: the size and name of each unit, in ascending order.
        positions: returns the positions of a run after the given numbers of steps [point], or None if unknown.
    """

    key: str
    title: str
    label: str
    units: tuple[tuple[float, str], ...]
    positions: Callable[[Run, np.ndarray], np.ndarray | None]

    def unit(self, runs: Iterable[Run]) -> tuple[float, str]:
        """Choose a unit that suits the runs. Return its size, and the axis label including its name."""
        ends = [self.positions(run, np.array([run.steps_done])) for run in runs]
        longest = max((float(end[0]) for end in ends if end is not None), default=0.0)
        size, name = [unit for unit in self.units if unit[0] * LEAST <= longest or unit == self.units[0]][-1]
        return size, f"{self.label} ({name})" if name else self.label


STEPS = Axis("steps", "Steps", "steps", ((1.0, ""),), lambda run, steps: steps)
AXES = (
    STEPS,
    Axis("tokens", "Tokens", "training tokens", COUNTS, Run.tokens_at),
    Axis("flops", "FLOPs", "FLOPs, including the curvature", FLOPS, Run.flops_at),
    Axis("time", "Time", "training time", TIMES, Run.seconds_at),
)
