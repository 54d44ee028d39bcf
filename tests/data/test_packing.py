"""How documents fill sequences, counted pair by pair."""

import numpy as np
import pytest

from sophia_levanter.batch import document_starts
from sophia_levanter.data.packing import packing_of

END = 99


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("seq_len", [1, 4, 7, 100])
def test_packing_is_what_masks_would_see(seq_len, parts):
    """Two documents are empty; sequences of 4 and of 7 leave a shorter one at the end."""
    lengths = [3, 1, 9, 12, 1, 2, 5]
    tokens = np.concatenate([[*range(length - 1), END] for length in lengths])
    sequences = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
    starts = [document_starts(sequence[None], END)[0] for sequence in sequences]
    counts = np.array([len(np.unique(row)) for row in starts])
    seen = sum(int((np.arange(len(row)) - row + 1).sum()) for row in starts)
    pairs = sum(len(row) * (len(row) + 1) // 2 for row in starts)
    found = packing_of(np.array_split(np.cumsum(lengths), parts), seq_len)
    assert (found.median_length, found.longest) == (3, 12)
    assert found.documents_per_sequence == pytest.approx(counts.mean())
    assert found.share_of_one == pytest.approx((counts == 1).mean())
    assert found.removed_share == pytest.approx(1 - seen / pairs)


@pytest.mark.parametrize("lengths", [[2, 9], [9, 2, 3, 3], [5]])
def test_the_median_length(lengths):
    assert packing_of([np.cumsum(lengths)], 4).median_length == np.median(lengths)
