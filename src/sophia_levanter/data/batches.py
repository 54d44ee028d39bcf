"""Batches of sequences from a corpus or a mixture of corpora, and verification of corpora during training."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from sophia_levanter.config.data import validation_field
from sophia_levanter.data.token_store import Tokens
from sophia_levanter.data.tokenizer import NUM_BYTES, Tokenizer
from sophia_levanter.errors import InputError, counted

if TYPE_CHECKING:
    from sophia_levanter.partition.processes import Processes

# Seconds to wait for other processes, which may still be reading a large corpus.
READING_PATIENCE = 3600.0
# How often to check whether the run is stopping, in seconds. A stopping run waits at most this long for verification.
STOPPING_PATIENCE = 0.5
# The possible outcomes of verification on a process, from worst to best.
FOUND = ("wrong", "failed", "unfinished", "compared")

# The byte-bigram model adds SMOOTHING to each count, so that unseen pairs have a nonzero probability. It counts the
# pairs in the first BIGRAM_BYTES bytes, reading BIGRAM_TOKENS tokens at a time.
SMOOTHING = 0.01
BIGRAM_BYTES = 64 << 20
BIGRAM_TOKENS = 1 << 20

_numbers = itertools.count()


@dataclass(frozen=True)
class Part:
    """A corpus in a mixture. Sequences are sampled in proportion to the weights."""

    first: int  # the index of its first token in the mixture
    num_tokens: int
    weight: float


class Mixture(Tokens):
    """Several corpora, concatenated and read as one corpus. A sequence must lie within a single corpus."""

    location = "the mixture"

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

    def _read(self, start: int, stop: int) -> np.ndarray:
        pieces = [
            corpus.read(max(start - part.first, 0), min(stop - part.first, part.num_tokens)).astype(np.int32)
            for part, corpus in zip(self.parts, self._corpora, strict=True)
            if start < part.first + part.num_tokens and stop > part.first
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def _read_sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        sequences = np.empty((len(starts), length), np.int32)
        owners = np.searchsorted(self._firsts, starts, side="right") - 1
        for number in np.unique(owners).tolist():
            rows = owners == number
            sequences[rows] = self._corpora[number].read_sequences(starts[rows] - self._firsts[number], length)
        return sequences

    def check_whole(self, cache_dir: Path) -> None:
        for corpus in self._corpora:
            corpus.check_whole(cache_dir)

    def check_unchanged(self) -> None:
        for corpus in self._corpora:
            corpus.check_unchanged()


def parts_of(corpus: Tokens) -> list[Part]:
    """Return the parts of a mixture. A single corpus counts as one part."""
    return corpus.parts if isinstance(corpus, Mixture) else [Part(0, corpus.num_tokens, 1.0)]


def sequence_counts(corpus: Tokens, seq_len: int) -> list[int]:
    """Return the number of training sequences in each part of a corpus.

    Raises:
        InputError: if the corpus, or a part of the mixture, is shorter than one sequence.
    """
    parts = parts_of(corpus)
    for number, part in enumerate(parts):
        if part.num_tokens <= seq_len:
            one = "data.train" if len(parts) == 1 else f"part {number} of data.train"
            raise InputError(
                f"{one} has {part.num_tokens} tokens, but one sequence requires {seq_len + 1} "
                "(model.seq_len + 1); provide more text or reduce model.seq_len"
            )
    return [(part.num_tokens - 1) // seq_len for part in parts]


class TrainBatches:
    """Training batches: `batches[step]` is a pure function of the data, the seed and the step.

    The cost of computing a batch does not depend on the step. A sequence consists of `seq_len + 1` tokens and starts at
    a multiple of `seq_len`. The inputs are all tokens except the last, and the targets are all tokens except the first.
    Each epoch visits all sequences in a new order. Tokens after the last full sequence are not used. A batch may span
    two epochs. Each part of a mixture has its own epochs. At any point, the number of sequences sampled so far from
    each of n parts matches its weight to within n - 1 sequences; grain rounds the weights to a hundredth of the
    smallest weight. The order of the sequences does not depend on the batch size.

    Args:
        corpus: the training tokens.
        seq_len: the number of predicted tokens in a sequence.
        batch_size: the number of sequences in a batch.
        changes: the changes in batch size, as `(step, batch size)` pairs in ascending order.
        seed: the seed for shuffling.

    Raises:
        InputError: if the corpus, or a part of the mixture, is shorter than one sequence.
        ValueError: if `seed` is not in [0, 2^32).
    """

    def __init__(
        self, corpus: Tokens, *, seq_len: int, batch_size: int, seed: int, changes: Sequence[tuple[int, int]] = ()
    ) -> None:
        parts, counts = parts_of(corpus), sequence_counts(corpus, seq_len)
        import grain  # takes seconds to import, and preparing text does not need it

        self.num_sequences = sum(counts)
        self._corpus = corpus
        self._seq_len = seq_len
        starts = [
            # Use different seeds, so that parts of the same length are shuffled differently.
            grain.MapDataset.range(part.first, part.first + count * seq_len, seq_len).seed((seed + i) % 2**32).shuffle()
            for i, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]
        endless = [dataset.repeat() for dataset in starts]
        self._starts = endless[0] if len(parts) == 1 else grain.MapDataset.mix(endless, [p.weight for p in parts])
        self._sizes = [(0, batch_size), *changes]

    def __getitem__(self, step: int) -> np.ndarray:
        """Return the batch for `step`, counted from 0, as int32 [batch, seq_len + 1]."""
        return self.rows(step)

    def rows(self, step: int, wanted: np.ndarray | None = None, *, skipped_windows: int = 0) -> np.ndarray:
        """Return the batch for `step`. Only the wanted rows are read; the others are filled with zeros.

        Args:
            step: the step, counted from 0.
            wanted: the indices of the rows to read, int [row]; by default, all rows.
            skipped_windows: the number of sequences that the run skipped before this batch.

        Returns:
            int32 [batch, seq_len + 1].
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        first, size = self._sequence_range(step)
        first += skipped_windows
        starts = np.array([self._starts[sequence] for sequence in range(first, first + size)], dtype=np.int64)
        if wanted is None or len(wanted) == len(starts):
            return self._corpus.read_sequences(starts, self._seq_len + 1)
        sequences = np.zeros((len(starts), self._seq_len + 1), np.int32)
        sequences[wanted] = self._corpus.read_sequences(starts[wanted], self._seq_len + 1)
        return sequences

    def sequences_between(self, step: int, later: int) -> int:
        """Return the number of sequences in the steps `[step, later)`."""
        return self._sequence_range(later)[0] - self._sequence_range(step)[0]

    def _sequence_range(self, step: int) -> tuple[int, int]:
        """Return the index of the first sequence in a step, and the number of sequences in the step."""
        before, since, size = 0, 0, 0
        for begins, next_size in self._sizes:
            if begins > step:
                break
            before += (begins - since) * size
            since, size = begins, next_size
        return before + (step - since) * size, size


class ValidationBatches:
    """Validation batches `(sequences, weights)`: int32 [batch, seq_len + 1] and float32 [batch, seq_len].

    Without `max_sequences`, every token in the store except the first is predicted exactly once. The last sequence and
    the last batch are padded with tokens and weights of 0.

    Args:
        store: the validation tokens.
        seq_len: the number of predicted tokens in a full sequence.
        batch_size: the number of sequences in a batch.
        max_sequences: the maximum number of sequences, spread evenly over the store; None uses all sequences.
        name: the name of the validation set, for error messages; empty for a single unnamed set.

    Raises:
        InputError: if the store has fewer than 2 tokens.
    """

    def __init__(
        self, store: Tokens, *, seq_len: int, batch_size: int, max_sequences: int | None = None, name: str = ""
    ) -> None:
        if store.num_tokens < 2:
            found = counted(store.num_tokens, "token")
            raise InputError(
                f"{validation_field(name)} has {found}, but at least 2 are required; provide more validation text"
            )
        total = -(-(store.num_tokens - 1) // seq_len)
        count = total if max_sequences is None else min(max_sequences, total)
        self._store = store
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._starts = np.arange(count, dtype=np.int64) * total // count * seq_len

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(self._starts), self._batch_size):
            sequences = np.zeros((self._batch_size, self._seq_len + 1), np.int32)
            weights = np.zeros((self._batch_size, self._seq_len), np.float32)
            for row, (start, end) in enumerate(self._ranges(first, first + self._batch_size)):
                sequences[row, : end - start] = self._store.read(start, end)
                weights[row, : end - start - 1] = 1
            yield sequences, weights

    def token_sequences(self) -> Iterator[np.ndarray]:
        """Yield all sequences without padding, uint16 or uint32 [position], with 2 to `seq_len + 1` tokens."""
        for start, end in self._ranges(0, len(self._starts)):
            yield self._store.read(start, end)

    def _ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        starts = self._starts[first:last]
        ends = np.minimum(starts + self._seq_len + 1, self._store.num_tokens)
        return zip(starts.tolist(), ends.tolist(), strict=True)


def bigram_bits_per_byte(train: Tokens, sequences: Iterable[np.ndarray], tokenizer: Tokenizer) -> float:
    """Compute the bits per byte of validation text under a byte-bigram model of `train`.

    The result is a baseline for language models. As with a language model, the first token of each sequence only serves
    as context, and the others are predicted. End-of-text costs bits, but does not count as a byte of text. The model is
    fitted to the first `BIGRAM_BYTES` bytes of `train`. The result is NaN if no bytes are predicted.
    """
    spelled = [np.frombuffer(token, np.uint8) for token in tokenizer.token_bytes]
    spelled[tokenizer.end_of_text] = np.array([NUM_BYTES])  # an extra symbol after the 256 bytes
    table, lengths = np.concatenate(spelled, dtype=np.int64), np.array([len(symbols) for symbols in spelled])
    offsets = np.cumsum(lengths) - lengths

    def symbols_of(tokens: np.ndarray) -> np.ndarray:
        ends = np.cumsum(lengths[tokens])
        # The table index of a symbol is the offset of its token plus its position within the token.
        first_place = np.repeat(offsets[tokens] - ends + lengths[tokens], lengths[tokens])
        return table[first_place + np.arange(len(first_place))]

    size, left = NUM_BYTES + 1, BIGRAM_BYTES
    counts, last = np.zeros(size**2, np.int64), np.empty(0, np.int64)
    for start in range(0, train.num_tokens, BIGRAM_TOKENS):
        piece = symbols_of(train.read(start, min(start + BIGRAM_TOKENS, train.num_tokens)))[:left]
        symbols = np.concatenate([last, piece])
        counts += np.bincount(symbols[:-1] * size + symbols[1:], minlength=size**2)
        last, left = symbols[-1:], left - len(piece)
        if not left:
            break
    smoothed = counts.reshape(size, size) + SMOOTHING
    bits = np.log2(smoothed.sum(axis=1, keepdims=True)) - np.log2(smoothed)
    total_bits, total_bytes = 0.0, 0
    for sequence in sequences:
        # A special token has no bytes. After one, the first byte serves as context.
        symbols, first = symbols_of(sequence), max(int(lengths[sequence[0]]), 1)
        total_bits += float(bits[symbols[first - 1 : -1], symbols[first:]].sum())
        total_bytes += int((symbols[first:] != NUM_BYTES).sum())
    return total_bits / total_bytes if total_bytes else math.nan


class Verification:
    """Verifies corpora in a background thread during training. Each process of the run verifies its own files."""

    def __init__(self, corpora: Sequence[Tokens], cache_dir: Path, processes: Processes) -> None:
        self._corpora = corpora
        self._processes = processes
        self._name = f"data/{next(_numbers)}"
        self._finishes = 0
        self._failure: Exception | None = None
        self._thread = self._start(lambda corpus: corpus.check_whole(cache_dir))

    def check(self) -> None:
        """Raise any error found so far, if the run has a single process. Call this method often.

        Raises:
            InputError: if a corpus is damaged or invalid.
            Exception: if verification itself fails.
        """
        if self._failure is not None and self._processes.count == 1:
            raise self._failure

    def finish(self, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all corpora are verified, then check that they are unchanged.

        All processes must call this method together. It returns, on every process, whether the corpora of all processes
        are verified. It stops waiting once `stopping` returns true, because a stopping run may be killed soon.

        Raises:
            InputError: on every process, if a corpus on any process is damaged or invalid.
            Exception: if verification itself fails on this process, or `OSError` if it fails on another process.
        """
        if self._wait(stopping) and self._failure is None:
            self._thread = self._start(lambda corpus: corpus.check_unchanged())
            self._wait(stopping)
        from sophia_levanter.partition.processes import PATIENCE

        mine = json.dumps(self._found())
        name, patience = f"{self._name}/{self._finishes}", PATIENCE if self._finishes else READING_PATIENCE
        everywhere = self._processes.gather(f"{name}/found", mine, patience)
        worst = min(everywhere, key=lambda text: FOUND.index(json.loads(text)[0]), default=None)
        worst = self._processes.broadcast(f"{name}/worst", worst, patience)
        if self._finishes:
            self._processes.forget(f"{self._name}/{self._finishes - 1}")
        self._finishes += 1
        found, message = json.loads(worst)
        if found not in ("wrong", "failed"):
            return bool(found == "compared")
        if self._failure is not None and worst == mine:
            raise self._failure
        raise InputError(message) if found == "wrong" else OSError(message)

    def _start(self, check: Callable[[Tokens], None]) -> Thread:
        thread = Thread(target=self._note, args=[check], name="verification", daemon=True)
        thread.start()
        return thread

    def _wait(self, stopping: Callable[[], bool]) -> bool:
        """Wait until the thread has ended or the run is stopping, and return whether the thread has ended."""
        self._thread.join(STOPPING_PATIENCE)
        while self._thread.is_alive() and not stopping():
            self._thread.join(STOPPING_PATIENCE)
        return not self._thread.is_alive()

    def _found(self) -> tuple[str, str]:
        """Return the outcome on this process (one of `FOUND`) and the error message, if any."""
        error = self._failure
        if error is None:
            return "unfinished" if self._thread.is_alive() else "compared", ""
        if isinstance(error, InputError):
            return "wrong", str(error)
        return "failed", str(error) if isinstance(error, OSError) else repr(error)

    def _note(self, check: Callable[[Tokens], None]) -> None:
        try:
            for corpus in self._corpora:
                check(corpus)
        except Exception as error:  # after any error, the corpora do not count as verified
            self._failure = error
