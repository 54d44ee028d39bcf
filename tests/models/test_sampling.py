"""Which tokens may be drawn, how often they are, and that a row's text is its own."""

from functools import partial

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.batch import document_starts
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.trainer import Sampling
from sophia_levanter.errors import InputError
from sophia_levanter.models import sampling as sampling_module
from sophia_levanter.models.sampling import generate, restricted
from sophia_levanter.optim._categorical import sample_categorical
from sophia_levanter.partition.mesh import partition_of

DRAWN = 18  # tokens; the context holds 8, and is halved three times
HOT = Sampling(temperature=2.0)
SAMPLINGS = [HOT, Sampling(0), Sampling(1.5, 40, 0.9)]
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6]]
KEYS = jax.random.split(jax.random.key(0), len(PROMPTS))


def texts(model, prompts, keys=KEYS, num_tokens=DRAWN, sampling=HOT, **arguments):
    """The tokens of each prompt."""
    drawn = list(generate(model, prompts, num_tokens, keys=keys, sampling=sampling, **arguments))
    return [[token for token in row if token is not None] for row in zip(*drawn, strict=True)]


@pytest.fixture
def rigged(make_model):
    """A model that, after position i, predicts token 20 + i: blocks that do nothing, and positions alone count."""
    model = make_model()
    directions = np.random.default_rng(0).normal(size=(128, 8))
    directions -= directions.mean(-1, keepdims=True)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    # Logits lie so far apart that the likeliest token is certain, and positions outweigh tokens.
    arrays = (1e5 * directions, 1e9 * directions[20:28], np.ones(8))
    zeros = [jnp.zeros_like(x.c_proj.weight.array) for x in (model.blocks.stacked.attn, model.blocks.stacked.mlp)]
    return eqx.tree_at(
        lambda m: [
            m.wte.weight.array,
            m.wpe.weight.array,
            m.ln_f.weight.array,
            m.blocks.stacked.attn.c_proj.weight.array,
            m.blocks.stacked.mlp.c_proj.weight.array,
        ],
        model,
        [*(jnp.asarray(a, jnp.float32) for a in arrays), *zeros],
    )


def test_predicts_what_the_head_is_rigged_to(rigged):
    # Prompts end at positions 2, 0 and 7; of a full context of eight the last four go on, the newest at position 3.
    assert texts(rigged, PROMPTS, num_tokens=12) == [
        [22, 23, 24, 25, 26, 27, 23, 24, 25, 26, 27, 23],
        [20, 21, 22, 23, 24, 25, 26, 27, 23, 24, 25, 26],
        [27, 23, 24, 25, 26, 27, 23, 24, 25, 26, 27, 23],
    ]


def test_end_of_text_ends_a_row(rigged):
    assert texts(rigged, PROMPTS, end_of_text=24) == [[22, 23, 24], [20, 21, 22, 23, 24], [27, 23, 24]]
    assert len(list(generate(rigged, PROMPTS, DRAWN, keys=KEYS, sampling=HOT, end_of_text=24))) == 5


def test_a_prompt_longer_than_the_context(rigged):
    assert texts(rigged, [list(range(11))], KEYS[:1], 3) == [[27, 23, 24]]


def test_a_document_begins_anew_where_training_masked_them(rigged):
    """Token 22 ends a document: what comes after it has positions from 0."""
    assert texts(rigged, [[5, 6, 7], [22], [9, 22, 5, 6]], num_tokens=7, document_end=22) == [
        [22, 23, 20, 21, 22, 23, 20],
        [20, 20, 21, 22, 23, 20, 21],
        [21, 22, 23, 20, 21, 22, 23],
    ]


def test_a_prompt_of_two_documents_is_read_as_in_training(make_model):
    model, context = make_model(), [5, 6, 99, 7, 8]

    @jax.jit
    def next_token(model, tokens, starts, last):
        named = (hax.named(x, "position") for x in (tokens, starts))
        return jnp.argmax(model.head(model.hidden_in_documents(*named, None)).array[last])

    (found,) = texts(model, [context], KEYS[:1], 3, Sampling(0), document_end=99)
    for token in found:
        window = np.pad(context, (0, 8 - len(context))).astype(np.int32)
        starts = document_starts(window[None], 99)[0]
        assert token == int(next_token(model, window, starts, len(context) - 1))
        context.append(token)


logits_at = jax.jit(lambda model, window, last: model(hax.named(window, "position")).array[last])


@partial(jax.jit, static_argnums=2)
def drawn_from(logits, uniform, sampling):
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    return sample_categorical(restricted(logits, sampling), uniform)


def by_whole_contexts(model, prompt, key, sampling):
    """The same draws by the model's forward pass over a context put together by hand each time."""
    context, drawn = list(prompt), []
    for n in range(DRAWN):
        window = np.zeros(8, np.int32)
        window[: len(context)] = context
        uniform = jax.random.uniform(jax.random.fold_in(key, n))
        drawn.append(int(drawn_from(logits_at(model, window, len(context) - 1), uniform, sampling)))
        context = context + drawn[-1:] if len(context) < 8 else [*context[-3:], drawn[-1]]
    return drawn


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_is_the_same_as_with_whole_contexts(make_model, sampling):
    model = make_model()
    found = texts(model, PROMPTS, sampling=sampling)
    assert found == [by_whole_contexts(model, p, k, sampling) for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert sampling.temperature == 0 or len({*found[0]}) > 3


def test_a_row_has_its_own_text(make_model):
    model = make_model()
    together = texts(model, PROMPTS)
    for row in (0, 1, 2):
        assert texts(model, [PROMPTS[row]], KEYS[row][None]) == [together[row]]
    assert texts(model, PROMPTS[::-1], KEYS[::-1]) == together[::-1]
    # Another key, another text.
    assert texts(model, [PROMPTS[0]], KEYS[1][None]) != [together[0]]


@pytest.mark.parametrize(
    ("mesh", "copies"),
    [(MeshConfig(), 1), (MeshConfig(data=4, model=2, fsdp="embed"), 4)],
    ids=["rows that do not divide", "all"],
)
def test_a_mesh_changes_nothing(make_model, mesh, copies):
    model = make_model()
    prompts, keys = PROMPTS[:2] * copies, jnp.tile(KEYS[:2], copies)
    partition = partition_of(mesh)
    with partition.active():
        assert texts(partition.place(model), prompts, keys) == texts(model, PROMPTS[:2], KEYS[:2]) * copies


def test_padding_of_the_vocabulary_is_never_drawn(make_model):
    model = make_model()
    weight = model.wte.weight.array
    rows = jnp.where(jnp.arange(128)[:, None] < 100, weight, 100 * weight)
    model = eqx.tree_at(lambda m: m.wte.weight.array, model, rows)
    for sampling in SAMPLINGS:
        assert max(map(max, texts(model, PROMPTS, sampling=sampling))) < 100


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt is empty"), ([100], r"outside \[0, 100\)"), ([-1], "outside")],
)
def test_bad_prompts(make_model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), [[1], prompt], 1, keys=KEYS[:2], sampling=HOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it must be 0 or at least 1e-06"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(InputError, match=message):
        Sampling(**arguments)


def by_numpy(logits, temperature, top_k, top_p):
    """One row's logits as transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper leave them."""
    scores = logits.astype(np.float64) / temperature
    if top_k is not None:
        scores[scores < np.sort(scores)[-min(top_k, len(scores))]] = -np.inf
    if top_p is not None:
        ascending = np.argsort(scores, kind="stable")
        weights = np.exp(scores[ascending] - scores.max())
        removed = np.cumsum(weights / weights.sum()) <= 1 - top_p
        removed[-1] = False
        scores[ascending[removed]] = -np.inf
    return scores


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1e-9), (1, None), (5, 0.3), (300, 0.9), (1000, 1.0)])
def test_restrictions(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    for temperature in (0.5, 3.0):
        found = np.asarray(restricted(jnp.asarray(logits), Sampling(temperature, top_k, top_p)))
        for row, given in zip(found, logits, strict=True):
            wanted = by_numpy(given, temperature, top_k, top_p)
            np.testing.assert_array_equal(row == -np.inf, wanted == -np.inf)
            np.testing.assert_allclose(row[row > -np.inf], wanted[wanted > -np.inf], rtol=1e-6)


def kept(probabilities, **arguments):
    found = restricted(jnp.log(jnp.asarray(probabilities)), Sampling(1.0, **arguments))
    return np.flatnonzero(np.asarray(found) > -np.inf).tolist()


def test_the_token_that_reaches_top_p_is_kept():
    probabilities = [0.1, 0.4, 0.2, 0.25, 0.05]
    assert kept(probabilities, top_p=0.39) == [1]
    assert kept(probabilities, top_p=0.41) == [1, 3]
    assert kept(probabilities, top_p=0.66) == [1, 2, 3]
    # Of what top_k leaves, 1 has 0.4 / 0.65 and reaches it alone.
    assert kept(probabilities, top_p=0.6, top_k=2) == [1]
    assert kept(probabilities, top_p=0.6, top_k=3) == [1, 3]


def test_equally_likely_tokens():
    # Those as likely as the k-th stay, as in transformers; of those for top_p the first ones.
    assert kept([0.2, 0.3, 0.3, 0.2], top_k=1) == [1, 2]
    assert kept([0.25] * 4, top_p=0.49) == [0, 1]


def test_few_lengths_are_compiled():
    lengths = {needed: sampling_module._prefill_length(needed, 1024) for needed in (1, 128, 129, 511, 512, 513, 1023)}
    assert lengths == {1: 128, 128: 128, 129: 256, 511: 512, 512: 512, 513: 1024, 1023: 1024}
    assert sampling_module._prefill_length(3, 1000) == 1000
    assert sampling_module._prefill_length(3, 128) == 128


def test_a_short_prompt_of_a_long_context(make_model):
    """The whole context is not read for it."""
    model = make_model(seq_len=256, embed_dim=4, num_heads=1)
    found = texts(model, [[5, 6, 7]], KEYS[:1], 2)
    window = np.pad([5, 6, 7, found[0][0]], (0, 252)).astype(np.int32)
    logits = jnp.stack([logits_at(model, window, last) for last in (2, 3)])
    uniforms = jnp.stack([jax.random.uniform(jax.random.fold_in(KEYS[0], n)) for n in range(2)])
    assert found[0] == sample_categorical(restricted(logits, HOT), uniforms).tolist()
