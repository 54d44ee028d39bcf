from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sophia_levanter.data.batches import Mixture, TrainBatches
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.errors import InputError

MakeStore = Callable[..., TokenStore]


@pytest.fixture
def mixture(make_store: MakeStore) -> Mixture:
    return Mixture([make_store(["a" * 400]), make_store(["b" * 40]), make_store(["c" * 4000])], [3.0, 1.0, 0.5])


def test_it_reads_as_one(mixture: Mixture) -> None:
    text = "a" * 400 + "|" + "b" * 40 + "|" + "c" * 4000 + "|"
    assert mixture.num_tokens == len(text)
    for start, stop in [(0, len(text)), (395, 450), (401, 442), (7, 7)]:
        shown = bytes(np.where(mixture.read(start, stop) == 256, ord("|"), mixture.read(start, stop)).tolist())
        assert shown.decode() == text[start:stop]
    windows = mixture.read_windows(np.array([500, 0, 401]), 4)
    assert [bytes(row.tolist()) for row in windows] == [b"cccc", b"aaaa", b"bbbb"]
    for start in (-1, len(text)):
        with pytest.raises(IndexError):
            mixture.read_windows(np.array([start]), 2)
    with pytest.raises(IndexError):
        mixture.read(3, 2)


def test_every_part_has_its_share_of_any_stretch(mixture: Mixture) -> None:
    batches = TrainBatches(mixture, seq_len=4, batch_size=9, seed=0)
    first = np.concatenate([batches[step][:, 0] for step in range(200)])
    counts = Counter(chr(token) for token in first.tolist())
    assert counts == {"a": 1200, "b": 400, "c": 200}
    for stop in range(1, len(first)):
        for token, share in (("a", 6 / 9), ("b", 2 / 9), ("c", 1 / 9)):
            assert abs((first[:stop] == ord(token)).sum() - share * stop) <= 1


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
