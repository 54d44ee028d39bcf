"""A report as one HTML page that holds all it shows."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from html import escape as escape_html
from importlib.metadata import version

import numpy as np

from sophia_levanter.printing import one_line
from sophia_levanter.reporting.axes import AXES, STEPS, Axis
from sophia_levanter.reporting.comparability import Comparability
from sophia_levanter.reporting.details import Row, configurations, facts
from sophia_levanter.reporting.figures import sample_of_line, svg
from sophia_levanter.reporting.headline import COLUMNS, Cell, headline
from sophia_levanter.reporting.panels import BITS, TRAINING, VALIDATION, Panel, curves_of, other_panels
from sophia_levanter.reporting.runs import Run
from sophia_levanter.reporting.template import PAGE

NUMBERS = ("parameters", "steps", "tokens", "win rate", "tokens/s", "MFU", "skipped steps", "bits per byte")
OF_OTHER_TOKENS = "It is per token, and not to be compared between tokenizers."


def escape(text: str, quote: bool = True) -> str:
    """Text as HTML, whatever characters it holds."""
    return escape_html(one_line(text), quote)


def loss_panels(comparability: Comparability) -> list[Panel]:
    """The panels of losses that can be compared as far as any can."""
    validation = VALIDATION if comparability.same_tokenizer and comparability.same_text else BITS
    if comparability.same_tokenizer:
        return [validation, TRAINING]
    return [validation, replace(TRAINING, caption=f"{TRAINING.caption} {OF_OTHER_TOKENS}")]


def axes_of(runs: Sequence[Run]) -> list[Axis]:
    """The axes that are known for any of the runs."""
    return [axis for axis in AXES if any(axis.positions(run, np.zeros(1)) is not None for run in runs)]


def render(runs: Sequence[Run], comparability: Comparability) -> str:
    """The page.

    Args:
        runs: at least one, each with a name of its own.
        comparability: what their losses allow.
    """
    samples = [sample_of_line(number) for number in range(len(runs))]
    differing, same = configurations(runs)
    names = [run.name for run in runs]
    return PAGE.substitute(
        title=escape(", ".join(names)),
        heading="1 training run" if len(runs) == 1 else f"{len(runs)} training runs",
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}, sophia_levanter {escape(version('sophia-levanter'))}",
        notes="".join(f"<p class='note'>{escape(note)}</p>" for note in comparability.notes),
        headline=_headline(headline(runs, comparability), samples),
        legend="".join(_name(name, sample) for name, sample in zip(names, samples, strict=True)),
        losses=_losses(runs, loss_panels(comparability)),
        others="".join(_panel(panel, runs, STEPS) for panel in other_panels(runs)),
        differing=_differing(differing, names),
        same=_table([(name, values[:1]) for name, values in same], ["of each run" if len(runs) > 1 else names[0]]),
        num_same=len(same),
        fields="fields that are the same" if len(runs) > 1 else "fields",
        facts=_table(facts(runs), names),
    )


def _headline(rows: Sequence[Sequence[Cell]], samples: Sequence[str]) -> str:
    head = "".join(f"<th{_number_class(name)}>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>"
        + f"<th>{_name(row[0].text, sample)}</th>"
        + "".join(_cell(cell, column) for cell, column in zip(row[1:], COLUMNS[1:], strict=True))
        + "</tr>"
        for row, sample in zip(rows, samples, strict=True)
    )
    return f"<table class='headline'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: Cell, column: str) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    remark = f" <small>{escape(cell.remark)}</small>" if cell.remark else ""
    return f"<td{_number_class(column)}>{text}{remark}</td>"


def _number_class(column: str) -> str:
    return " class='number'" if column in NUMBERS or column.endswith("loss") else ""


def _name(name: str, sample: str) -> str:
    return f"<span class='name'><img src='{sample}' alt=''>{escape(name)}</span>"


def _losses(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    axes = axes_of(runs)
    buttons = "".join(
        f"<input type='radio' name='axis' id='against-{axis.key}'{' checked' if axis is STEPS else ''}>"
        f"<label for='against-{axis.key}'>{axis.title}</label>"
        for axis in axes
    )
    grids = "".join(
        f"<div class='grid against-{axis.key}'>{''.join(_panel(panel, runs, axis) for panel in panels)}</div>"
        for axis in axes
    )
    return f"<div class='losses'><span class='against'>against</span>{buttons}{grids}</div>"


def _panel(panel: Panel, runs: Sequence[Run], axis: Axis) -> str:
    if not any(curves_of(panel, run) for run in runs):
        return f"<figure><h3>{escape(panel.title)}</h3><p class='none'>Not measured yet.</p></figure>"
    names = ", ".join(run.name for run in runs if curves_of(panel, run))
    alt = escape(f"{panel.title} against {axis.label}: {names}", quote=True)
    return (
        f"<figure><h3>{escape(panel.title)}</h3><img src='{svg(panel, runs, axis)}' alt=\"{alt}\">"
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def _differing(rows: Sequence[Row], names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    if not rows:
        return "<p>The runs have the same configuration.</p>"
    return f"<div class='wide differing'>{_table(rows, names)}</div>"


def _table(rows: Sequence[Row], names: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
