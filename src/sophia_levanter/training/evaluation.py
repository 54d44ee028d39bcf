"""The loss on a validation set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jmp
import numpy as np

from sophia_levanter.batch import Batch, batch_from_windows, count_targets
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.partition.mesh import Partition

if TYPE_CHECKING:
    from sophia_levanter.data.batches import ValidationBatches


class Evaluation(NamedTuple):
    """A validation loss.

    Attributes:
        loss: mean over predicted tokens, nats.
        bits_per_byte: total bits over the bytes of text that the predicted tokens stand for; end-of-text has none.
    """

    loss: float
    bits_per_byte: float


class Evaluator:
    """Evaluates models of one shape on one validation set; compiles once.

    Args:
        batches: the validation windows.
        byte_lengths: [vocab] bytes of text that each token stands for.
        partition: the devices, and where arrays lie on them.
        policy: parameters' and compute dtypes.
    """

    def __init__(
        self, batches: ValidationBatches, byte_lengths: np.ndarray, partition: Partition, policy: jmp.Policy
    ) -> None:
        self._batches = batches
        self._byte_lengths = byte_lengths
        self._partition = partition

        @eqx.filter_jit
        def sums(model: Gpt2, batch: Batch) -> tuple[jax.Array, jax.Array]:
            one = jax.tree.map(lambda x: x["microbatch", 0], batch, is_leaf=lambda x: hasattr(x, "axes"))
            return policy.cast_to_compute(model).losses(one)[0], count_targets(one)

        self._sums = sums

    def __call__(self, model: Gpt2, on_progress: Callable[[], None] = lambda: None) -> Evaluation:
        """The losses of a model, each token weighted the same.

        Args:
            model: the model.
            on_progress: called after each batch.
        """
        results = []
        text_bytes = 0
        for windows, weights in self._batches:
            with self._partition.active():
                results.append(self._sums(model, self._partition.place(batch_from_windows(windows, weights))))
            text_bytes += int((self._byte_lengths[windows[:, 1:]] * (weights > 0)).sum())
        nats = targets = 0.0
        for loss, count in results:
            nats, targets = nats + float(loss), targets + float(count)
            on_progress()
        return Evaluation(nats / targets, nats / math.log(2) / text_bytes if text_bytes else math.nan)
