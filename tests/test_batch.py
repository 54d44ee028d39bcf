"""From windows of tokens to batches."""

import numpy as np

from sophia_levanter.batch import batch_from_sequences, count_targets


def test_targets_are_the_next_tokens_and_microbatches_are_runs_of_rows():
    windows = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    batch = batch_from_sequences(windows, num_microbatches=2)
    assert [(a.name, a.size) for a in batch.tokens.axes] == [("microbatch", 2), ("batch", 2), ("position", 5)]
    np.testing.assert_array_equal(batch.tokens.array.reshape(4, 5), windows[:, :-1])
    np.testing.assert_array_equal(batch.targets.array.reshape(4, 5), windows[:, 1:])
    assert float(count_targets(batch)) == 20


def test_weights_are_kept():
    weights = np.zeros((4, 5), np.float32)
    weights[1, 2] = 1
    batch = batch_from_sequences(np.zeros((4, 6), np.int32), weights)
    assert batch.weights.array[0, 1, 2] == 1
    assert float(count_targets(batch)) == 1
