import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.models.sampling import generate
from sophia_levanter.optim.categorical import sample_categorical

DRAWN = 14  # tokens; the context holds 8
KEY = 0
TEMPERATURE = 2.0


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
    tokens = generate(rigged, [5, 6, 7], DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE)
    assert (tokens.dtype, tokens.shape) == (np.int32, (DRAWN,))
    # The prompt's last position is 2; a full context stays at position 7.
    assert tokens.tolist() == [22, 23, 24, 25, 26] + [27] * (DRAWN - 5)


def test_a_prompt_longer_than_the_context(rigged):
    tokens = generate(rigged, list(range(11)), DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE)
    assert tokens.tolist() == [27] * DRAWN


def one_by_one(model, prompt):
    """The same draws, with the window put together by hand each time."""
    uniforms = jax.random.uniform(jax.random.key(KEY), (DRAWN,))

    @jax.jit
    def draw(window, last, uniform):
        return sample_categorical(model(hax.named(window, "position")).array[last] / TEMPERATURE, uniform)

    tokens = list(prompt)
    for uniform in uniforms:
        seen = tokens[-8:]
        window = np.zeros(8, np.int32)
        window[: len(seen)] = seen
        tokens.append(int(draw(window, len(seen) - 1, uniform)))
    return tokens[len(prompt) :]


def test_is_the_same_as_one_by_one(make_model):
    model = make_model()
    tokens = generate(model, [5, 6, 7], DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE)
    assert tokens.tolist() == one_by_one(model, [5, 6, 7])
    assert len(set(tokens.tolist())) > 3
    again = generate(model, (5, 6, 7), DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE)
    np.testing.assert_array_equal(again, tokens)
    other = generate(model, [5, 6, 7], DRAWN, key=jax.random.key(KEY + 1), temperature=TEMPERATURE)
    assert not np.array_equal(other, tokens)
    # Only the last eight tokens of a prompt are read.
    long = [9, 9, *range(8)]
    np.testing.assert_array_equal(
        generate(model, long, DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE),
        generate(model, long[2:], DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE),
    )


def test_padding_of_the_vocabulary_is_never_drawn(make_model):
    model = make_model()
    weight = model.wte.weight.array
    rows = jnp.where(jnp.arange(128)[:, None] < 100, weight, 100 * weight)
    model = eqx.tree_at(lambda m: m.wte.weight.array, model, rows)
    tokens = generate(model, [5, 6, 7], DRAWN, key=jax.random.key(KEY), temperature=TEMPERATURE)
    assert tokens.min() >= 0
    assert tokens.max() < 100


@pytest.mark.parametrize(
    ("prompt", "temperature", "message"),
    [
        ([], 1.0, "prompt is empty"),
        ([100], 1.0, r"outside \[0, 100\)"),
        ([-1], 1.0, "outside"),
        ([1], 0.0, "temperature"),
    ],
)
def test_bad_input(make_model, prompt, temperature, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), prompt, 1, key=jax.random.key(KEY), temperature=temperature)
