"""Evaluate models on validation sets."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple

import equinox as eqx
import jax
import jmp
import numpy as np

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.data.batches import ValidationBatches
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.mesh import Partition

BATCHES_AHEAD = 4  # batches queued while the devices compute one


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        loss: mean loss over predicted tokens, in nats. For named sets, the unweighted mean over the sets.
        bits_per_byte: total loss in bits divided by `text_bytes`. For named sets, the unweighted mean over the sets.
        tokens: number of predicted tokens.
        text_bytes: number of bytes of text in the predicted tokens; an end-of-text token has none.
        sets: the evaluation of each named set, keyed by name.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int
    sets: Mapping[str, Evaluation] = MappingProxyType({})

    def numbers(self, prefix: str = "") -> dict[str, float]:
        """Return the losses, keyed by their names in metrics.jsonl. `prefix` precedes the last part of each name."""
        found = {f"validation/{prefix}loss": self.loss, f"validation/{prefix}bits_per_byte": self.bits_per_byte}
        for name, own in self.sets.items():
            found[f"validation/{name}/{prefix}loss"] = own.loss
            found[f"validation/{name}/{prefix}bits_per_byte"] = own.bits_per_byte
        return found


@dataclass(eq=False)
class Evaluator:
    """Evaluates models of the same shape on one validation set.

    Attributes:
        batches: the validation sequences.
        byte_lengths: [vocab], the number of bytes of text in each token.
        policy: dtypes for parameters and computation.
        document_end: the token that ends a document; None if attention and positions continue across documents.
    """

    batches: ValidationBatches
    byte_lengths: np.ndarray
    partition: Partition
    policy: jmp.Policy
    document_end: int | None = None

    def __call__(self, model: LanguageModel, on_progress: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluate a model, weighting all tokens equally. `on_progress` is called after each batch."""
        pending: deque[jax.Array] = deque()
        nats = 0.0
        tokens = text_bytes = 0
        for sequences, weights in self.batches:
            with self.partition.active():
                batch = batch_from_sequences(sequences, weights, document_end=self.document_end)
                batch = self.partition.place(batch)
                pending.append(_summed_loss(self.partition, self.policy, model, batch))
            tokens += int(np.count_nonzero(weights))
            text_bytes += int((self.byte_lengths[sequences[:, 1:]] * (weights > 0)).sum())
            if len(pending) > BATCHES_AHEAD:
                nats += float(pending.popleft())
                on_progress()
        for loss in pending:
            nats += float(loss)
            on_progress()
        bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else math.nan
        return Evaluation(nats / tokens, bits_per_byte, tokens, text_bytes)


def evaluate_sets(
    evaluators: Mapping[str, Evaluator], model: LanguageModel, on_progress: Callable[[], None] = lambda: None
) -> Evaluation:
    """Evaluate a model on each validation set, and compute the unweighted mean of the losses.

    The evaluators are keyed by set name, in the same order in all processes. An unnamed set has the key "".
    """
    found = {name: evaluator(model, on_progress) for name, evaluator in evaluators.items()}
    if "" in found:
        return found[""]
    sets = found.values()
    return Evaluation(
        fmean(one.loss for one in sets),
        fmean(one.bits_per_byte for one in sets),
        sum(one.tokens for one in sets),
        sum(one.text_bytes for one in sets),
        found,
    )


@eqx.filter_jit
def _summed_loss(partition: Partition, policy: jmp.Policy, model: LanguageModel, batch: Batch) -> jax.Array:
    """Sum the loss over a batch with one microbatch. The partition must be active, as compilation depends on it."""
    one = jax.tree.map(lambda x: x["microbatch", 0], batch, is_leaf=lambda x: hasattr(x, "axes"))
    return policy.cast_to_compute(model).losses(one)[0]
