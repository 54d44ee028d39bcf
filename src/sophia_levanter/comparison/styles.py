"""How the lines of a picture are told apart, the same in all pictures."""

from __future__ import annotations

from typing import Any

Style = dict[str, Any]

# Okabe and Ito's, for all kinds of colour vision, without their yellow, which is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
MOST_STYLES = len(COLOURS) * len(LINES)

ADVISED_WIN_RATES = (0.1, 0.5)  # README of the authors' code


def style_of(number: int) -> Style:
    """Matplotlib's arguments for the line of that number, from 0; they repeat after `MOST_STYLES`."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
