"""Batches of token windows: shuffled and endless for training, in order for validation."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.errors import InputError


class TrainBatches:
    """`batches[step]`: a pure function of the data, the seed and the step, at any step in constant time.

    A window is the `seq_len + 1` tokens from a multiple of `seq_len` on: the inputs and, moved on by one, the targets.
    Every epoch goes through all windows in an order of its own; the tokens after the last whole window are left out. A
    batch may reach over the end of an epoch.

    Raises:
        InputError: if the store is shorter than one window.
        ValueError: if `seed` is not in [0, 2^32).
    """

    def __init__(self, store: TokenStore, *, seq_len: int, batch_size: int, seed: int) -> None:
        self.num_windows = (store.num_tokens - 1) // seq_len
        if self.num_windows < 1:
            raise InputError(
                f"data.train has {store.num_tokens} tokens, and one window needs {seq_len + 1} (model.seq_len + 1); "
                "give more text or a shorter model.seq_len"
            )
        self._store = store
        self._seq_len = seq_len
        windows = grain.MapDataset.range(self.num_windows).seed(seed).shuffle().repeat()
        self._window_batches = windows.batch(batch_size)

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of `step`, counted from 0: int32 [batch, seq_len + 1]."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        windows = np.asarray(self._window_batches[step], dtype=np.int64)
        return self._store.read_windows(windows * self._seq_len, self._seq_len + 1)


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

    def __init__(self, store: TokenStore, *, seq_len: int, batch_size: int, max_windows: int | None = None) -> None:
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
