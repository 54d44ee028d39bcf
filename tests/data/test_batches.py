"""Batches of windows: their order, validation, mixtures of texts, and targets."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sophia_levanter.batch import batch_from_sequences, count_targets, document_starts
from sophia_levanter.data import token_store
from sophia_levanter.data.batches import Mixture, TrainBatches, ValidationBatches
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.errors import InputError

MakeStore = Callable[..., TokenStore]


TEXT = "".join(random.Random(0).choices("abcdefgh", k=1000))  # 1001 tokens with end-of-text


def starts(windows: np.ndarray, tokens: np.ndarray, seq_len: int) -> list[int]:
    """Which window of the store each row is."""
    count = (len(tokens) - 1) // seq_len
    table = {tuple(tokens[i * seq_len : (i + 1) * seq_len + 1].tolist()): i for i in range(count)}
    assert len(table) == count
    return [table[tuple(row)] for row in windows.tolist()]


def test_an_epoch_is_every_window_once_in_a_new_order(make_store: MakeStore) -> None:
    store = make_store([TEXT])
    tokens = store.read(0, store.num_tokens)
    batches = TrainBatches(store, seq_len=40, batch_size=5, seed=0)
    assert batches.num_sequences == 25
    assert batches[0].shape == (5, 41)
    assert batches[0].dtype == np.int32
    epochs = [
        [start for step in range(5 * epoch, 5 * epoch + 5) for start in starts(batches[step], tokens, 40)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(25))
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_depends_on_data_seed_and_step_only(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store([TEXT])
    steps = [3, 0, 7, 10**9]
    batches = TrainBatches(store, seq_len=16, batch_size=4, seed=5)
    first = [batches[step] for step in steps]
    again = TrainBatches(store, seq_len=16, batch_size=4, seed=5)
    for step, batch in reversed(list(zip(steps, first, strict=True))):
        np.testing.assert_array_equal(again[step], batch)
    other = TrainBatches(store, seq_len=16, batch_size=4, seed=6)
    assert not any(np.array_equal(other[step], batch) for step, batch in zip(steps, first, strict=True))
    monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", 0)
    for step, batch in zip(steps, first, strict=True):
        np.testing.assert_array_equal(again[step], batch)


def test_the_order_of_the_first_batches_is_pinned(make_store: MakeStore) -> None:
    """A resumed run must find the order that it left, with a later version of grain too."""
    store = make_store([TEXT])
    batches = TrainBatches(store, seq_len=40, batch_size=8, seed=1)
    tokens = store.read(0, store.num_tokens)
    assert starts(batches[0], tokens, 40) == [10, 5, 7, 3, 8, 23, 9, 2]
    assert starts(batches[1000], tokens, 40) == [2, 23, 11, 20, 13, 4, 0, 12]


def test_batches_larger_than_the_corpus_repeat_it(make_store: MakeStore) -> None:
    store = make_store(["abcdefgh"])
    batch = TrainBatches(store, seq_len=4, batch_size=7, seed=0)[0]
    assert {bytes(row[:4].tolist()) for row in batch} == {b"abcd", b"efgh"}
    assert (
        TrainBatches(make_store(["abcd"]), seq_len=4, batch_size=2, seed=0)[3].tolist() == [[97, 98, 99, 100, 256]] * 2
    )


def test_negative_steps_are_refused(make_store: MakeStore) -> None:
    with pytest.raises(IndexError):
        TrainBatches(make_store([TEXT]), seq_len=4, batch_size=2, seed=0)[-1]


def test_a_corpus_shorter_than_a_window(make_store: MakeStore) -> None:
    store = make_store(["abcd"])
    TrainBatches(store, seq_len=4, batch_size=1, seed=0)
    with pytest.raises(InputError, match=r"^data\.train has 5 tokens.*6 .*model\.seq_len"):
        TrainBatches(store, seq_len=5, batch_size=1, seed=0)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(40, 5), (7, 4), (2000, 2), (1, 300)])
def test_validation_predicts_every_token_but_the_first_once(
    make_store: MakeStore, seq_len: int, batch_size: int
) -> None:
    store = make_store([TEXT])
    batches = ValidationBatches(store, seq_len=seq_len, batch_size=batch_size)
    predicted: list[int] = []
    context: list[int] = []
    count = 0
    for windows, weights in batches:
        count += 1
        assert (windows.shape, windows.dtype) == ((batch_size, seq_len + 1), np.int32)
        assert (weights.shape, weights.dtype) == ((batch_size, seq_len), np.float32)
        assert set(np.unique(weights)) <= {0, 1}
        predicted += windows[:, 1:][weights == 1].tolist()
        context += windows[:, :-1][weights == 1].tolist()
        assert not windows[:, 1:][weights == 0].any()
    tokens = store.read(0, store.num_tokens).tolist()
    assert predicted == tokens[1:]
    assert context == tokens[:-1]
    assert count == len(batches)
    assert sum(weights.sum() for _, weights in batches) == len(tokens) - 1


def test_token_windows_are_the_batches_not_filled_up(make_store: MakeStore) -> None:
    batches = ValidationBatches(make_store([TEXT]), seq_len=64, batch_size=3, max_sequences=9)
    rows = [
        row[: int(weight.sum()) + 1]
        for windows, weights in batches
        for row, weight in zip(windows, weights, strict=True)
        if weight.any()
    ]
    windows = list(batches.token_sequences())
    assert len(windows) == len(rows) == 9
    for window, row in zip(windows, rows, strict=True):
        np.testing.assert_array_equal(window, row)


def test_a_few_validation_windows_are_spread_evenly(make_store: MakeStore) -> None:
    store = make_store([TEXT])
    tokens = store.read(0, store.num_tokens)
    batches = ValidationBatches(store, seq_len=40, batch_size=4, max_sequences=6)
    assert len(batches) == 2
    chosen = starts(np.array(list(batches.token_sequences())), tokens, 40)
    assert len(chosen) == 6
    gaps = np.diff([*chosen, 25])
    assert chosen[0] == 0
    assert set(gaps.tolist()) == {4, 5}
    assert sum(weights.sum() for _, weights in batches) == 6 * 40
    everything = ValidationBatches(store, seq_len=40, batch_size=4, max_sequences=1000)
    assert sum(weights.sum() for _, weights in everything) == 1000


def test_a_validation_set_with_nothing_to_predict(make_store: MakeStore) -> None:
    with pytest.raises(InputError, match=r"^data\.validation has 1 token"):
        ValidationBatches(make_store([""]), seq_len=4, batch_size=1)
    with pytest.raises(InputError, match=r"^data\.validation\.books has 1 token"):
        ValidationBatches(make_store([""]), seq_len=4, batch_size=1, name="books")


def test_changes_of_the_batch_size_keep_the_order(make_store: MakeStore) -> None:
    store = make_store([TEXT])
    one = TrainBatches(store, seq_len=16, batch_size=1, seed=5)
    windows = np.concatenate([one[step] for step in range(200)])
    changing = TrainBatches(store, seq_len=16, batch_size=2, seed=5, changes=[(3, 7), (5, 1), (6, 20)])
    sizes = [2, 2, 2, 7, 7, 1, 20, 20, 20]
    for step in (8, 0, 5, 3, 4, 7, 6, 2, 1):
        first = sum(sizes[:step])
        np.testing.assert_array_equal(changing[step], windows[first : first + sizes[step]])


def test_windows_that_are_passed_over_do_not_come(make_store: MakeStore) -> None:
    store = make_store([TEXT])
    one = TrainBatches(store, seq_len=16, batch_size=1, seed=5)
    batches = TrainBatches(store, seq_len=16, batch_size=4, seed=5)
    wanted = [one[window] for window in range(3 * 4 + 7, 4 * 4 + 7)]
    np.testing.assert_array_equal(batches.rows(3, skipped_windows=7), np.concatenate(wanted))


def test_rows_that_are_not_wanted_are_not_read(make_store: MakeStore) -> None:
    batches = TrainBatches(make_store([TEXT]), seq_len=16, batch_size=6, seed=5)
    rows = batches.rows(3, np.array([1, 4]))
    np.testing.assert_array_equal(rows[[1, 4]], batches[3][[1, 4]])
    assert not rows[[0, 2, 3, 5]].any()


def test_the_shuffle_takes_no_memory(make_store: MakeStore) -> None:
    """A permutation of so many windows would take 8 GB."""

    class Large:
        num_tokens = 10**12

        def read_sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
            return np.broadcast_to(starts[:, None], (len(starts), length))

    tracemalloc.start()
    batches = TrainBatches(Large(), seq_len=1000, batch_size=32, seed=0)
    starts = np.concatenate([batches[step][:, 0] for step in (0, 7, 10**6, 10**8)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(set(starts.tolist())) == 128
    assert starts.max() > 10**11


@pytest.fixture
def mixture(make_store: MakeStore) -> Mixture:
    return Mixture([make_store(["a" * 400]), make_store(["b" * 40]), make_store(["c" * 4000])], [3.0, 1.0, 0.5])


def test_it_reads_as_one(mixture: Mixture) -> None:
    text = "a" * 400 + "|" + "b" * 40 + "|" + "c" * 4000 + "|"
    assert mixture.num_tokens == len(text)
    for start, stop in [(0, len(text)), (395, 450), (401, 442), (7, 7)]:
        shown = bytes(np.where(mixture.read(start, stop) == 256, ord("|"), mixture.read(start, stop)).tolist())
        assert shown.decode() == text[start:stop]
    windows = mixture.read_sequences(np.array([500, 0, 401]), 4)
    assert [bytes(row.tolist()) for row in windows] == [b"cccc", b"aaaa", b"bbbb"]
    for start in (-1, len(text)):
        with pytest.raises(IndexError):
            mixture.read_sequences(np.array([start]), 2)
    with pytest.raises(IndexError):
        mixture.read(3, 2)


def test_every_part_has_its_share_of_any_stretch(mixture: Mixture) -> None:
    batches = TrainBatches(mixture, seq_len=4, batch_size=9, seed=0)
    first = np.concatenate([batches[step][:, 0] for step in range(200)])
    counts = Counter(chr(token) for token in first.tolist())
    assert counts == {"a": 1200, "b": 400, "c": 200}
    for token, share in (("a", 6 / 9), ("b", 2 / 9), ("c", 1 / 9)):
        wanted = share * np.arange(1, len(first) + 1)
        assert np.abs(np.cumsum(first == ord(token)) - wanted).max() <= 1


def test_many_parts_have_their_shares_from_the_beginning(make_store: MakeStore) -> None:
    """Grain takes the parts out one by one, and rounds each time, so three parts may be off by more than one."""
    weights = np.array([1.0, 1.0, 5.0])
    corpora = [make_store([letter * 40]) for letter in "abc"]
    batches = TrainBatches(Mixture(corpora, weights.tolist()), seq_len=4, batch_size=70, seed=0)
    found = batches[0][:, :1] == [ord(letter) for letter in "abc"]
    off = np.cumsum(found, axis=0) - np.arange(1, 71)[:, None] * weights / weights.sum()
    assert 1 < np.abs(off).max() < 2


def test_each_part_has_epochs_of_its_own(make_store: MakeStore) -> None:
    texts = ["".join(map(chr, range(65, 85))), "".join(map(chr, range(97, 117)))]
    stores = [make_store([text]) for text in texts]
    batches = TrainBatches(Mixture(stores, [1.0, 1.0]), seq_len=2, batch_size=20, seed=0)
    orders = []
    for step in range(3):
        firsts = [chr(token) for token in batches[step][:, 0].tolist()]
        upper = [c for c in firsts if c.isupper()]
        lower = [c for c in firsts if c.islower()]
        assert sorted(upper) == list(texts[0][::2])
        assert sorted(lower) == list(texts[1][::2])
        orders += ["".join(upper).lower(), "".join(lower)]
    assert len(set(orders)) == 6  # no epoch and no part in the order of another


def test_a_part_that_is_too_short(make_store: MakeStore) -> None:
    corpus = Mixture([make_store(["a" * 400]), make_store(["b"])], [1.0, 1.0])
    with pytest.raises(InputError, match=r"^part 1 of data\.train has 2 tokens"):
        TrainBatches(corpus, seq_len=4, batch_size=2, seed=0)


def test_the_facts_tell_mixtures_apart(make_store: MakeStore) -> None:
    one, other = make_store(["a"]), make_store(["b"])
    facts = [
        Mixture(corpora, weights).facts
        for corpora, weights in (([one, other], [1, 1]), ([other, one], [1, 1]), ([one, other], [1, 2]))
    ]
    assert facts[0] != facts[1]
    assert facts[0] != facts[2]


def test_targets_are_the_next_tokens_and_microbatches_are_runs_of_rows():
    windows = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    batch = batch_from_sequences(windows, num_microbatches=2)
    assert [(a.name, a.size) for a in batch.tokens.axes] == [("microbatch", 2), ("batch", 2), ("position", 5)]
    np.testing.assert_array_equal(batch.tokens.array.reshape(4, 5), windows[:, :-1])
    np.testing.assert_array_equal(batch.targets.array.reshape(4, 5), windows[:, 1:])
    assert float(count_targets(batch)) == 20


def test_a_document_ends_with_its_end_of_text():
    tokens = np.array([[5, 9, 5, 5, 9], [9, 9, 5, 5, 5], [5, 5, 5, 5, 9]])
    starts = document_starts(tokens, 9)
    assert starts.dtype == np.int32
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]])


def test_a_batch_knows_its_documents_only_when_asked():
    """The last token of a sequence is a target alone."""
    sequences = np.array([[9, 5, 9, 9], [5, 9, 5, 5]], np.int32)
    assert batch_from_sequences(sequences).document_starts is None
    batch = batch_from_sequences(sequences, num_microbatches=2, document_end=9)
    assert batch.document_starts.axes == batch.tokens.axes
    np.testing.assert_array_equal(batch.document_starts.array, [[[0, 1, 1]], [[0, 0, 2]]])
    assert float(count_targets(batch)) == 6


def test_weights_are_kept():
    weights = np.zeros((4, 5), np.float32)
    weights[1, 2] = 1
    batch = batch_from_sequences(np.zeros((4, 6), np.int32), weights)
    assert batch.weights.array[0, 1, 2] == 1
    assert float(count_targets(batch)) == 1
