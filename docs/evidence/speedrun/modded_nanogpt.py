"""A model plug-in: the decoder of modded-nanogpt's optimization benchmark.

The formulas are those of `records/track_3_optimization/train_gpt_simple.py` in github.com/KellerJordan/modded-nanogpt.
The two programs have not been compared by execution. They differ in two ways: here, parameters are float32 (there, the
token embedding is bfloat16), and the 47 padding rows of the vocabulary are never predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import AxisSpec, NamedArray
from jax.typing import DTypeLike

from sophia_levanter.batch import Batch
from sophia_levanter.config.model import LARGEST, ModelConfig, TransformerConfig
from sophia_levanter.config.settings import setting
from sophia_levanter.errors import InputError
from sophia_levanter.models.layers import linear, normalize
from sophia_levanter.models.transformer import Block, Transformer, dropout
from sophia_levanter.optim._categorical import categorical_loss, sample_categorical

LOGIT_CAP = 15.0
SCORE_SCALE = 0.12
ROTARY_BASE = 1024.0
WEIGHT_VARIANCE = 0.33  # times 1 / inputs


@ModelConfig.register_subclass("modded_nanogpt")
@dataclass(frozen=True)
class ModdedNanogptConfig(TransformerConfig):
    """The decoder of modded-nanogpt's optimization benchmark. `initializer_range` has no effect.

    Raises:
        InputError: if a value is out of bounds, or the head size is not a multiple of 4 (half of its pairs rotate).
    """

    title: ClassVar[str] = "modded-nanogpt"

    num_heads: int = setting(6, "number of attention heads; must divide embed_dim", low=1, high=LARGEST)
    # The default of torch's rms_norm, which computes in float32 even if its input is bfloat16.
    layer_norm_epsilon: float = setting(2.0**-23, "epsilon added to the mean square in RMS norms", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise InputError(
                f"the head size is {self.head_dim}, but modded_nanogpt requires a multiple of 4; change model.num_heads"
            )

    def build(self, *, vocab_size: int, key: jax.Array) -> ModdedNanogpt:
        return ModdedNanogpt.init(self, vocab_size=vocab_size, key=key)

    @property
    def mlp_dim(self) -> int:
        return 4 * self.embed_dim

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        return super().axis_sizes() | {"mlp": ("4 x model.embed_dim", self.mlp_dim)}


class ModdedNanogptBlock(Block):
    """A pre-norm block with normalized queries and keys, and an MLP with a squared ReLU."""

    config: ModdedNanogptConfig = eqx.field(static=True)
    norm1: hnn.RmsNorm
    q: hnn.Linear  # embed -> (heads, head_size)
    k: hnn.Linear
    v: hnn.Linear
    attn_proj: hnn.Linear  # (heads, head_size) -> embed
    norm2: hnn.RmsNorm
    mlp_fc: hnn.Linear  # embed -> mlp
    mlp_proj: hnn.Linear  # mlp -> embed

    @staticmethod
    def init(config: ModdedNanogptConfig, *, key: jax.Array) -> ModdedNanogptBlock:
        k_q, k_k, k_v, k_fc = jax.random.split(key, 4)
        heads = (config.Heads, config.HeadSize)
        return ModdedNanogptBlock(
            config,
            _norm(config),
            _linear(config.Embed, heads, k_q),
            _linear(config.Embed, heads, k_k),
            _linear(config.Embed, heads, k_v),
            _linear(heads, config.Embed),
            _norm(config),
            _linear(config.Embed, config.Mlp, k_fc),
            _linear(config.Mlp, config.Embed),
        )

    def project(
        self, x: NamedArray, layer: NamedArray, positions: NamedArray | None
    ) -> tuple[NamedArray, NamedArray, NamedArray]:
        x, eps = normalize(self.norm1, x), self.config.layer_norm_epsilon
        query, keys, values = (linear(projection, x) for projection in (self.q, self.k, self.v))
        # Attention divides the scores by sqrt(head_size).
        scale = SCORE_SCALE * self.config.head_dim**0.5
        return (
            _normalized_and_rotated(query, positions, eps, scale),
            _normalized_and_rotated(keys, positions, eps),
            values,
        )

    def project_back(self, attended: NamedArray) -> NamedArray:
        return linear(self.attn_proj, attended)

    def apply_mlp(self, x: NamedArray) -> NamedArray:
        return linear(self.mlp_proj, hnn.relu_squared(linear(self.mlp_fc, normalize(self.norm2, x))))


class ModdedNanogpt(Transformer):
    """The model. Its logits are 15 z / sqrt(z^2 + 225), where z is the output of a head with a bias.

    Attributes:
        config: the model configuration.
        vocab_size: vocabulary size without padding.
        embedding: token embedding, [vocab (padded), embed].
        norm1: the norm of the token embedding.
        blocks: the blocks, stacked over [layers].
        norm2: the final norm.
        proj: output head, [vocab (padded), embed].
        proj_bias: bias of the output head, [vocab (padded)].
    """

    config: ModdedNanogptConfig = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    embedding: hnn.Embedding
    norm1: hnn.RmsNorm
    blocks: hnn.Stacked[ModdedNanogptBlock]
    norm2: hnn.RmsNorm
    proj: hnn.Embedding
    proj_bias: NamedArray

    @staticmethod
    def init(config: ModdedNanogptConfig, *, vocab_size: int, key: jax.Array) -> ModdedNanogpt:
        """Initialize the weights.

        The token embedding is drawn from N(0, 1), and other weights from N(0, 0.33 / inputs). The head, the layers that
        write to the residual stream, and all biases are 0.
        """
        k_embedding, k_blocks = jax.random.split(key)
        Vocab, Embed = config.Vocab(vocab_size), config.Embed
        keys = jax.random.split(k_blocks, config.num_layers)
        return ModdedNanogpt(
            config,
            vocab_size,
            hnn.Embedding(hax.random.normal(k_embedding, (Vocab, Embed)), Vocab, Embed),
            _norm(config),
            hnn.Stacked.init(config.Layers, ModdedNanogptBlock)(config, key=keys),
            _norm(config),
            hnn.Embedding(hax.zeros((Vocab, Embed)), Vocab, Embed),
            hax.zeros(Vocab),
        )

    def head_weights(self) -> NamedArray:
        return self.proj.weight

    def embed(self, tokens: NamedArray, positions: NamedArray | None, key: jax.Array | None = None) -> NamedArray:
        return dropout(self.config, normalize(self.norm1, self.embedding.embed(tokens)), key)

    def final_norm(self, x: NamedArray) -> NamedArray:
        return normalize(self.norm2, x)

    def head(self, hidden: NamedArray, dtype: DTypeLike | None = None) -> NamedArray:
        logits = self._capped_logits(hidden, dtype)[{"vocab": slice(0, self.vocab_size)}]
        return logits.astype(hidden.dtype if dtype is None else dtype)

    def _capped_logits(self, hidden: NamedArray, dtype: DTypeLike | None = None) -> NamedArray:
        """Compute logits over the padded vocabulary in float32 or wider from a matrix product in `dtype`."""
        z = hax.dot(hidden, self.head_weights(), axis="embed", preferred_element_type=dtype) + self.proj_bias
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return LOGIT_CAP * z * hax.rsqrt(hax.square(z) + LOGIT_CAP**2)

    def losses(
        self, batch: Batch, *, samples: NamedArray | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        # The blocked loss of other models computes gradients of plain logits. This one differentiates capped logits
        # automatically, and recomputes those of each block in the backward pass.
        model = self.gathered()
        hidden = model.hidden_in_documents(batch.tokens, batch.document_starts, key)
        size = min(self.config.loss_block_size, hidden.resolve_axis("position").size)

        @partial(jax.checkpoint, prevent_cse=False)
        def of_block(
            hidden: jax.Array, targets: jax.Array, weights: jax.Array, samples: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            named = model._capped_logits(hax.named(hidden, ("batch", "position", "embed")))
            logits = named.rearrange(("batch", "position", "vocab")).array
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)
            loss = jnp.sum(categorical_loss(logits, targets) * weights)
            if samples is None:
                return loss, jnp.zeros_like(loss)
            if not jnp.issubdtype(samples.dtype, jnp.integer):
                samples = sample_categorical(jax.lax.stop_gradient(logits), samples)
            return loss, jnp.sum(categorical_loss(logits, samples) * jnp.sqrt(weights))

        def add_block(sums: tuple, block: tuple) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, of_block(*block)), None

        blocks = [
            None if x is None else _split_positions(size, x) for x in (hidden, batch.targets, batch.weights, samples)
        ]
        zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
        sums, _ = jax.lax.scan(add_block, (zero, zero), tuple(blocks))
        return sums


def _split_positions(size: int, x: NamedArray) -> jax.Array:
    """Split [batch, position, ...] into [block, batch, position in block, ...]. Padding is 0 and thus has weight 0."""
    array = x.rearrange(("batch", "position", ...)).array
    array = jnp.pad(array, [(0, 0), (0, -array.shape[1] % size)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)


def _normalized_and_rotated(x: NamedArray, positions: NamedArray | None, eps: float, scale: float = 1.0) -> NamedArray:
    """Divide each head's vector [..., head_size] by its root mean square, rotate it, and multiply it by `scale`.

    Elements i and i + head_size / 2 form a pair. With n = head_size / 4, pair i < n is rotated by -position *
    1024^(-i / (n - 1)), and the other pairs are not rotated.
    """
    whole = x.resolve_axis("head_size")
    half = whole.resize(whole.size // 2)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * (scale * hax.rsqrt(hax.mean(hax.square(wide), whole) + eps))
    exponents = jnp.linspace(0, 1, half.size // 2, dtype=wide.dtype)
    frequencies = hax.named(jnp.append(ROTARY_BASE**-exponents, jnp.zeros_like(exponents)), half)
    at = hax.arange(x.resolve_axis("position")) if positions is None else positions
    angles = at.astype(wide.dtype).broadcast_axis(half) * frequencies
    cos, sin = hax.cos(angles), hax.sin(angles)
    first, second = wide.split(whole, [half, half])
    parts = [first * cos + second * sin, second * cos - first * sin]
    return hax.concatenate(whole, [part.rearrange(first.axes) for part in parts]).astype(x.dtype)


def _linear(In: AxisSpec, Out: AxisSpec, key: jax.Array | None = None) -> hnn.Linear:
    """Return a linear layer with a bias of 0, and with weights of 0 if no key is given."""
    axes = hax.concat_axis_specs(In, Out)
    std = (WEIGHT_VARIANCE / hax.axis_size(In)) ** 0.5
    weight = hax.zeros(axes) if key is None else hax.random.normal(key, axes) * std
    return hnn.Linear(weight, hax.zeros(Out), In, Out)


def _norm(config: ModdedNanogptConfig) -> hnn.RmsNorm:
    return hnn.RmsNorm.init(config.Embed, eps=config.layer_norm_epsilon, use_bias=False)
