from __future__ import annotations

from collections import Counter

import pytest

from sophia_levanter.data.documents import Split
from sophia_levanter.errors import InputError


def split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    sides: tuple[list[str], list[str]] = ([], [])
    splitting = Split(fraction, field="data.train")
    for document in documents:
        for held_out, text in splitting.push(document):
            sides[held_out].append(text)
    for held_out, text in splitting.finish():
        sides[held_out].append(text)
    return sides


DOCUMENTS = [f"document {i}" for i in range(400)]


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_every_document_is_on_one_side_and_the_share_is_right(fraction: float) -> None:
    train, validation = split(DOCUMENTS, fraction)
    assert Counter(train + validation) == Counter(DOCUMENTS)
    assert abs(len(validation) / len(DOCUMENTS) - fraction) < 3 * (fraction * (1 - fraction) / len(DOCUMENTS)) ** 0.5


def test_adding_documents_moves_none() -> None:
    _, before = split(DOCUMENTS, 0.1)
    _, after = split(["new first", *reversed(DOCUMENTS), *(f"more {i}" for i in range(100))], 0.1)
    assert set(before) == set(after) & set(DOCUMENTS)


def test_the_split_is_pinned() -> None:
    """A later version must not train on what an earlier one held out."""
    assert split(DOCUMENTS, 0.01)[1] == ["document 383"]


def test_the_same_text_is_on_one_side() -> None:
    train, validation = split(DOCUMENTS * 2, 0.3)
    assert not set(train) & set(validation)


def test_an_empty_side_gets_the_nearest_document_whatever_the_order() -> None:
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        train, validation = split(documents, 1e-9)
        assert Counter(train + validation) == Counter(DOCUMENTS)
        # The lowest hash is the first to cross as the fraction grows.
        assert len(validation) == 1
        assert validation[0] in split(DOCUMENTS, 0.03)[1]
        assert validation == split(DOCUMENTS[::2] + DOCUMENTS[1::2], 1e-9)[1]

        train, validation = split(documents, 1 - 1e-9)
        assert Counter(train + validation) == Counter(DOCUMENTS)
        assert len(train) == 1
        assert train[0] in split(DOCUMENTS, 0.97)[0]


def test_two_documents_make_two_sides() -> None:
    for i in range(20):
        train, validation = split([f"a{i}", f"b{i}"], 0.2)
        assert (len(train), len(validation)) == (1, 1)


def test_the_end_of_a_single_document_is_held_out() -> None:
    assert split(["é" * 90 + "ü" * 10], 0.1) == (["é" * 90], ["ü" * 10])
    assert split(["ab"], 0.001) == (["a"], ["b"])
    assert split(["ab"], 0.999) == (["a"], ["b"])


def test_the_same_text_is_on_one_side_where_one_side_would_be_empty() -> None:
    for documents in (["a", "b", "a", "b", "c"], ["c", "b", "b", "a", "a"]):
        for fraction in (1e-9, 1 - 1e-9):
            train, validation = split(documents, fraction)
            assert sorted(train + validation) == sorted(documents)
            assert train
            assert validation
            assert not set(train) & set(validation)
    assert split(["é" * 90 + "ü" * 10] * 2, 0.1)[1] == ["ü" * 10]


def test_it_goes_on_where_both_sides_had_documents() -> None:
    begun = Split(0.1, field="data.train")
    before = [side for text in DOCUMENTS[:200] for side in begun.push(text)]
    assert begun.is_settled
    going_on = Split(0.1, field="data.train", settled=True)
    after = [side for text in DOCUMENTS[200:] for side in going_on.push(text)] + going_on.finish()
    train, validation = split(DOCUMENTS, 0.1)
    assert [text for held_out, text in before + after if not held_out] == train
    assert [text for held_out, text in before + after if held_out] == validation


def test_a_single_character_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"^data\.train: .*'x'.*data\.validation"):
        split(["x"], 0.5)
