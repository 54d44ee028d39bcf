"""Several corpora of which batches take a share each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.data.token_store import Tokens


@dataclass(frozen=True)
class Part:
    """A corpus in a mixture.

    Attributes:
        first: number of its first token in the mixture.
        num_tokens: how many it has.
        weight: its share of the windows, relative to that of the others.
    """

    first: int
    num_tokens: int
    weight: float


class Mixture:
    """Corpora one after the other, read as if they were one."""

    def __init__(self, corpora: Sequence[Tokens], weights: Sequence[float]) -> None:
        self._corpora = corpora
        self._firsts = np.cumsum([0, *(corpus.num_tokens for corpus in corpora)])
        self.parts = [
            Part(first, corpus.num_tokens, weight)
            for first, corpus, weight in zip(self._firsts.tolist(), corpora, weights, strict=False)
        ]

    @property
    def num_tokens(self) -> int:
        return int(self._firsts[-1])

    @property
    def facts(self) -> dict[str, Any]:
        parts = zip(self.parts, self._corpora, strict=True)
        return {"mixture": [{"weight": part.weight, **corpus.facts} for part, corpus in parts]}

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in `[start, stop)`, int32 [position].

        Raises:
            IndexError: if the range is not within the mixture.
            InputError: if a store is damaged there.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within the {self.num_tokens} tokens of the mixture")
        pieces = [
            corpus.read(max(start - part.first, 0), min(stop - part.first, part.num_tokens)).astype(np.int32)
            for part, corpus in zip(self.parts, self._corpora, strict=True)
            if start < part.first + part.num_tokens and stop > part.first
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` on, int32 [window, position]; each within one part.

        Raises:
            IndexError: if a window is not within a part.
            InputError: if a store is damaged there.
        """
        windows = np.empty((len(starts), length), np.int32)
        owners = np.searchsorted(self._firsts, starts, side="right") - 1
        for number in np.unique(owners).tolist():
            if not 0 <= number < len(self._corpora):
                raise IndexError(f"a window is not within the {self.num_tokens} tokens of the mixture")
            rows = owners == number
            windows[rows] = self._corpora[number].read_windows(starts[rows] - self._firsts[number], length)
        return windows

    def check_whole(self, cache_dir: Path) -> None:
        """Compare all of each corpus with what it should be.

        Raises:
            InputError: if one differs.
        """
        for corpus in self._corpora:
            corpus.check_whole(cache_dir)

    def check_unchanged(self) -> None:
        """Notice what has been written to the corpora.

        Raises:
            InputError: if something was.
        """
        for corpus in self._corpora:
            corpus.check_unchanged()


def parts_of(corpus: Tokens) -> list[Part]:
    """The parts of a mixture; a corpus that is none is its own only part."""
    return corpus.parts if isinstance(corpus, Mixture) else [Part(0, corpus.num_tokens, 1.0)]
