"""Documents in one row: each is read as if it were alone, by every model; test_attention.py has each attention."""

import equinox as eqx
import haliax as hax
import jax
import numpy as np
import pytest

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.config.model import Gpt2Config, LlamaConfig

END, LENGTHS = 99, (5, 3)  # of two documents that fill the eight positions
LLAMA = {"config_class": LlamaConfig, "num_kv_heads": 1, "qk_norm": True}


@eqx.filter_jit
def logits_loss_and_gradients(model, batch):
    def loss(model):
        hidden = model.hidden_in_documents(batch.tokens, batch.document_starts, None)
        return model.losses(batch)[0], model.head(hidden).array

    (total, logits), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return logits, total, gradients


def packed_and_apart():
    """A row of two documents, and a row for each with the same targets, filled up with tokens that do not count."""
    sequence = np.random.default_rng(0).integers(0, END, (1, 9)).astype(np.int32)
    sequence[0, LENGTHS[0] - 1] = END
    packed = batch_from_sequences(sequence, document_end=END)
    packed = jax.tree.map(lambda x: x["microbatch", 0], packed, is_leaf=lambda x: hasattr(x, "axes"))
    tokens, targets, weights = np.zeros((3, 2, 8), np.int32)
    first = 0
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = sequence[0, first : first + length]
        targets[row, :length] = sequence[0, first + 1 : first + length + 1]
        weights[row, :length] = 1
        first += length
    return packed, Batch(*(hax.named(x, ("batch", "position")) for x in (tokens, targets, weights.astype(np.float32))))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ({"config_class": Gpt2Config}, {"attention": "xla", "gradient_checkpointing": "full"}),
        (LLAMA, {"attention": "blocked", "gradient_checkpointing": "dots"}),
    ],
    ids=["gpt2", "llama"],
)
def test_a_document_in_a_row_is_as_one_alone(kind, options, make_model):
    packed, apart = packed_and_apart()
    logits, loss, gradients = logits_loss_and_gradients(make_model(**kind, **options), packed)
    logits_apart, loss_apart, gradients_apart = logits_loss_and_gradients(make_model(**kind, attention="xla"), apart)
    for row, (first, length) in enumerate(zip((0, LENGTHS[0]), LENGTHS, strict=True)):
        np.testing.assert_allclose(logits[0, first : first + length], logits_apart[row, :length], atol=2e-5)
    assert float(loss) == pytest.approx(float(loss_apart), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_apart), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
