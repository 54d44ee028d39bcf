"""A report's files, and its lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sophia_levanter.files import write_atomically
from sophia_levanter.printing import one_line
from sophia_levanter.reporting.axes import STEPS
from sophia_levanter.reporting.comparability import Comparability
from sophia_levanter.reporting.figures import png
from sophia_levanter.reporting.headline import COLUMNS, headline
from sophia_levanter.reporting.page import axes_of, loss_panels, render
from sophia_levanter.reporting.panels import other_panels
from sophia_levanter.reporting.runs import Run

IN_TERMINAL = ("run", "steps", "last validation loss", "bits per byte", "win rate", "tokens/s", "status")


def write_report(runs: Sequence[Run], comparability: Comparability, page: Path) -> list[Path]:
    """Writes the page, and pictures named after it beside it.

    Args:
        runs: at least one, each with a name of its own.
        comparability: what their losses allow.
        page: the file of the page.

    Returns:
        The files, the page first.
    """
    files = {page: render(runs, comparability).encode(errors="replace")}
    losses, others = loss_panels(comparability), other_panels(runs)
    for axis in axes_of(runs):
        suffix = "" if axis is STEPS else f"-{axis.key}"
        files[page.with_name(f"{page.stem}-loss{suffix}.png")] = png(losses, runs, axis)
    for panel in others:
        files[page.with_name(f"{page.stem}-{panel.key}.png")] = png([panel], runs, STEPS)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def in_lines(runs: Sequence[Run], comparability: Comparability) -> list[str]:
    """The most important columns for a terminal, and what a reader must know."""
    chosen = [COLUMNS.index(name) for name in IN_TERMINAL]
    rows = [[_text(row[i].text, row[i].remark, row[i].best) for i in chosen] for row in headline(runs, comparability)]
    table = [[one_line(text) for text in row] for row in (IN_TERMINAL, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(chosen))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return lines + [one_line(f"NOTE: {note}") for note in comparability.notes]


def _text(text: str, remark: str, best: bool) -> str:
    return f"{text} {remark}".rstrip() + (" *" if best else "")
