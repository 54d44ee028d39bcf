"""Batches of token windows: shuffled and endless for training, in order for validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from sophia_levanter.data.mixture import parts_of
from sophia_levanter.data.token_store import Tokens
from sophia_levanter.errors import InputError


class TrainBatches:
    """`batches[step]`: a pure function of the data, the seed and the step, at any step in constant time and memory.

    A window is the `seq_len + 1` tokens from a multiple of `seq_len` on: the inputs and, moved on by one, the targets.
    Every epoch goes through all windows in an order of its own; the tokens after the last whole window are left out. A
    batch may reach over the end of an epoch. Of a mixture, each part has epochs of its own, and of the windows up to
    any one every part has its share by weight, to within one window (grain's mixing, in which weights are rounded to a
    hundredth of the smallest). The order of the windows does not depend on how many make a batch.

    Args:
        corpus: the tokens.
        seq_len: tokens that a window predicts.
        batch_size: windows in a batch.
        changes: `(step, batch size)` where another size begins, ascending.
        seed: of the order.

    Raises:
        InputError: if the corpus, or a part of the mixture, is shorter than one window.
        ValueError: if `seed` is not in [0, 2^32).
    """

    def __init__(
        self, corpus: Tokens, *, seq_len: int, batch_size: int, seed: int, changes: Sequence[tuple[int, int]] = ()
    ) -> None:
        parts = parts_of(corpus)
        counts = [(part.num_tokens - 1) // seq_len for part in parts]
        for part, count in zip(parts, counts, strict=True):
            if count < 1:
                one = "data.train" if len(parts) == 1 else f"part {parts.index(part)} of data.train"
                raise InputError(
                    f"{one} has {part.num_tokens} tokens, and one window needs {seq_len + 1} (model.seq_len + 1); "
                    "give more text or a shorter model.seq_len"
                )
        self.num_windows = sum(counts)
        self._corpus = corpus
        self._seq_len = seq_len
        starts = [
            # Parts of the same length are in different orders.
            grain.MapDataset.range(part.first, part.first + count * seq_len, seq_len).seed((seed + i) % 2**32).shuffle()
            for i, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]
        endless = [dataset.repeat() for dataset in starts]
        self._starts = endless[0] if len(parts) == 1 else grain.MapDataset.mix(endless, [p.weight for p in parts])
        self._sizes = [(0, batch_size), *changes]

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of `step`, counted from 0: int32 [batch, seq_len + 1]."""
        return self.rows(step)

    def rows(self, step: int, wanted: np.ndarray | None = None, *, skipped_windows: int = 0) -> np.ndarray:
        """The batch of `step`, of which only some rows are read; the others are zeros.

        Args:
            step: counted from 0.
            wanted: numbers of rows, int [row]; all if not given.
            skipped_windows: how much further on in the order of the windows this batch is.

        Returns:
            int32 [batch, seq_len + 1].
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        first, size = self._window_range(step)
        first += skipped_windows
        starts = np.array([self._starts[window] for window in range(first, first + size)], dtype=np.int64)
        if wanted is None or len(wanted) == len(starts):
            return self._corpus.read_windows(starts, self._seq_len + 1)
        windows = np.zeros((len(starts), self._seq_len + 1), np.int32)
        windows[wanted] = self._corpus.read_windows(starts[wanted], self._seq_len + 1)
        return windows

    def windows_between(self, step: int, later: int) -> int:
        """How many windows the steps in `[step, later)` have."""
        return self._window_range(later)[0] - self._window_range(step)[0]

    def _window_range(self, step: int) -> tuple[int, int]:
        """Number of the first window of a step, and how many there are."""
        before, since, size = 0, 0, 0
        for begins, next_size in self._sizes:
            if begins > step:
                break
            before += (begins - since) * size
            since, size = begins, next_size
        return before + (step - since) * size, size


class ValidationBatches:
    """Iterates over `(windows, weights)`: int32 [batch, seq_len + 1] and float32 [batch, seq_len].

    Together the windows predict every token of the store but the first exactly once. Where the last window and the last
    batch are filled up, the tokens are 0 and the weights, which go with the predicted tokens, are 0 too.

    Args:
        store: the validation tokens.
        seq_len: tokens that a whole window predicts.
        batch_size: windows in a batch.
        max_windows: take so many windows, spread evenly over the store, if it has more; None takes all.

    Raises:
        InputError: if the store has no token to predict.
    """

    def __init__(self, store: Tokens, *, seq_len: int, batch_size: int, max_windows: int | None = None) -> None:
        if store.num_tokens < 2:
            raise InputError(
                f"data.validation has {store.num_tokens} token(s), and at least 2 are needed; give more validation text"
            )
        total = -(-(store.num_tokens - 1) // seq_len)
        count = total if max_windows is None else min(max_windows, total)
        self._store = store
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._starts = np.arange(count, dtype=np.int64) * total // count * seq_len

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(self._starts), self._batch_size):
            windows = np.zeros((self._batch_size, self._seq_len + 1), np.int32)
            weights = np.zeros((self._batch_size, self._seq_len), np.float32)
            for row, (start, end) in enumerate(self._ranges(first, first + self._batch_size)):
                windows[row, : end - start] = self._store.read(start, end)
                weights[row, : end - start - 1] = 1
            yield windows, weights

    def token_windows(self) -> Iterator[np.ndarray]:
        """The same windows one by one and not filled up: uint16 or uint32 [position], 2 to `seq_len + 1` long."""
        for start, end in self._ranges(0, len(self._starts)):
            yield self._store.read(start, end)

    @property
    def _ends(self) -> np.ndarray:
        return np.minimum(self._starts + self._seq_len + 1, self._store.num_tokens)

    def _ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        return zip(self._starts[first:last].tolist(), self._ends[first:last].tolist(), strict=True)
