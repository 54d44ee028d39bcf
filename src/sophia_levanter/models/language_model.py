"""The model interface used by training, evaluation, generation, planning and export."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from sophia_levanter.batch import Batch
from sophia_levanter.config.model import ModelConfig
from sophia_levanter.errors import InputError
from sophia_levanter.models.loss import Targets, blocked_cross_entropy
from sophia_levanter.optim._matrices import matrices_tree, matrix_views
from sophia_levanter.optim._trees import is_named
from sophia_levanter.partition.mesh import gather_params

PyTree = Any


class LanguageModel(eqx.Module):
    """A causal language model, defined by its final hidden states and its output head.

    The vocabulary is padded to a multiple of 128; callers never see the padding.

    Attributes:
        config: the model configuration.
        vocab_size: vocabulary size without padding.
    """

    config: eqx.AbstractVar[ModelConfig]
    vocab_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def final_hidden(self, tokens: NamedArray, key: jax.Array | None) -> NamedArray:
        """Compute the final hidden states of a model whose parameters have been gathered.

        Args:
            tokens: int32 [..., position], with at most `config.seq_len` positions.
            key: a JAX random key for dropout; None for no dropout.

        Returns:
            [..., position, embed] in the parameter dtype.
        """

    def hidden_in_documents(
        self, tokens: NamedArray, document_starts: NamedArray | None, key: jax.Array | None
    ) -> NamedArray:
        """Compute `final_hidden` for rows with several documents, restarting attention and positions at each document.

        A model that defines this method must also override `attention_on` in its configuration.

        Args:
            document_starts: int32 [..., position], the position in the row at which the document of each token begins;
                None to treat each row as one document.
            tokens, key: as for `final_hidden`.

        Raises:
            InputError: if the model does not define this method.
        """
        raise InputError(
            f"data.mask_documents is true, but {type(self).__qualname__} does not define hidden_in_documents()"
        )

    @abc.abstractmethod
    def head_weights(self) -> NamedArray:
        """Return the weights of the output head, [vocab (padded), embed]."""

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward passes for one token: 6 per parameter, unless overridden by a model.

        Recomputation and curvature are not counted.
        """
        return 6.0 * count_parameters(self)

    def gathered(self) -> LanguageModel:
        """Return the model with all parameters gathered, if they are split over devices."""
        return gather_params(self)

    def hidden(self, tokens: NamedArray, *, key: jax.Array | None = None) -> NamedArray:
        """Gather the parameters and compute the final hidden states; see `final_hidden`."""
        return self.gathered().final_hidden(tokens, key)

    def __call__(self, tokens: NamedArray, *, key: jax.Array | None = None) -> NamedArray:
        """Compute logits over the vocabulary without padding, [..., position, vocab] in the parameter dtype.

        The arguments are those of `final_hidden`.
        """
        model = self.gathered()
        return model.head(model.final_hidden(tokens, key))

    def head(self, hidden: NamedArray, dtype: DTypeLike | None = None) -> NamedArray:
        """Compute logits over the vocabulary without padding, [..., vocab], from final hidden states, [..., embed].

        The default `dtype` is that of the hidden states.
        """
        logits = hax.dot(hidden, self.head_weights(), axis="embed", preferred_element_type=dtype)
        return logits[{"vocab": slice(0, self.vocab_size)}]

    def losses(
        self, batch: Batch, *, samples: NamedArray | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the summed next-token losses on true and on sampled labels, without materializing all logits.

        Args:
            batch: a batch of sequences, [batch, position].
            samples: [batch, position] float32 uniforms for drawing labels, or int labels; None for no second loss.
            key: a JAX random key for dropout; None for no dropout.

        Returns:
            Two float32 scalars in nats; see `models.loss.blocked_cross_entropy`.
        """

        def array(x: NamedArray) -> jax.Array:
            return x.rearrange(("batch", "position", ...)).array

        model = self.gathered()
        if batch.document_starts is None:
            hidden = model.final_hidden(batch.tokens, key)
        else:
            hidden = model.hidden_in_documents(batch.tokens, batch.document_starts, key)
        hidden = hidden.rearrange(("batch", "position", "embed"))
        targets = Targets(array(batch.targets), array(batch.weights), None if samples is None else array(samples))
        head = model.head_weights().rearrange(("vocab", "embed")).array
        return blocked_cross_entropy(self.vocab_size, self.config.loss_block_size, hidden.array, head, targets)

    def weight_decay_mask(self) -> PyTree:
        """Return a prefix of the model: True for matrices and embeddings, False for biases and norms of any shape."""

        def mask(layer: object) -> object:
            params = eqx.filter(layer, eqx.is_inexact_array)
            matrix = isinstance(layer, hnn.Linear | hnn.Embedding)
            decays = jax.tree.map(lambda _: False, params)
            return eqx.tree_at(lambda x: x.weight.array, decays, True) if matrix else decays

        return jax.tree.map(mask, self, is_leaf=_is_layer)

    def matrix_axes(self) -> PyTree:
        """Return the matrices for Muon and the Kronecker basis, which are the weights of all linear layers.

        Each layer has its own matrices, and an axis `qkv` contains three: query, key and value. Embeddings, the output
        head, norms and biases are excluded.

        Returns:
            A prefix of the model parameters with `optax.contrib.MuonDimensionNumbers` for matrices and None elsewhere.
        """

        def axes(layer: object) -> object:
            if not isinstance(layer, hnn.Linear):
                return None
            # qkv is not an axis of the matrices; like layers, it enumerates them.
            position = {axis.name: i for i, axis in enumerate(layer.weight.axes)}
            inputs, outputs = (
                tuple(position[axis.name] for axis in hax.util.ensure_tuple(spec) if axis.name != "qkv")
                for spec in (layer.In, layer.Out)
            )
            entries = (MuonDimensionNumbers(inputs, outputs), None)
            return eqx.tree_at(lambda x: (x.weight, x.bias), layer, entries, is_leaf=lambda x: x is None)

        return jax.tree.map(axes, self, is_leaf=_is_layer)

    def parameter_roles(self) -> PyTree:
        """Return the role of each parameter, for parameter groups.

        `matrix`: the matrices from `matrix_axes()`. `head`: `head_weights()`, unless tied to the token embedding.
        `embedding`: all other weights of embedding layers. `vector`: everything else, such as norms and biases.

        Returns:
            A pytree of role names that is a prefix of the model parameters.
        """
        head = self.head_weights()
        named = [x for x in jax.tree.leaves(self, is_leaf=is_named) if is_named(x)]
        has_own_head = sum(set(x.axes) == set(head.axes) for x in named) > 1
        layers = jax.tree.leaves(self, is_leaf=_is_layer)
        embeddings = [layer.weight.array for layer in layers if isinstance(layer, hnn.Embedding)]

        def role(leaf: object, is_matrix: bool) -> str:
            if leaf is head.array and has_own_head:
                return "head"
            if any(leaf is embedding for embedding in embeddings):
                return "embedding"
            return "matrix" if is_matrix else "vector"

        leaves, structure = jax.tree.flatten(self)
        views = matrix_views(matrix_axes, self)
        return jax.tree.unflatten(
            structure, [role(leaf, view is not None) for leaf, view in zip(leaves, views, strict=True)]
        )

    # Generation. By default, the cache stores tokens, and the model recomputes its whole context for each new token.

    def empty_cache(self, Batch: Axis) -> PyTree:
        """Return an empty cache for rows without tokens. `Batch` is the row axis, named `batch`."""
        return hax.zeros((Batch, self.config.Pos), jnp.int32)

    def prefill(self, cache: PyTree, row: jax.Array, tokens: NamedArray) -> PyTree:
        """Replace one row of the cache.

        Args:
            cache: the cache of all rows.
            row: the index of the row, an int scalar.
            tokens: int32 [position], the tokens of the row from position 0, at most `config.seq_len`. They may be
                padded at the end, because decoding overwrites the padding.
        """
        return write_row(cache, row, tokens)

    def decode_step(self, cache: PyTree, tokens: NamedArray, positions: NamedArray) -> tuple[NamedArray, PyTree]:
        """Append one token to each row and predict the next one.

        Args:
            cache: the cache of all earlier positions.
            tokens: int32 [batch].
            positions: int32 [batch], the position of the token in each row, less than `config.seq_len`.

        Returns:
            Logits over the vocabulary without padding, float32 [batch, vocab], and the cache with these tokens.
        """
        cache = cache.at["position", positions].set(tokens)
        model = self.gathered()
        hidden = model.final_hidden(cache, None)["position", positions]
        return model.head(hidden, jnp.float32), cache


def decay_mask(model: LanguageModel) -> PyTree:
    """Return `model.weight_decay_mask()`. Pass this function to an optimizer as its mask."""
    return model.weight_decay_mask()


def matrix_axes(model: LanguageModel) -> PyTree:
    """Return `model.matrix_axes()`. Pass this function to an optimizer as its `matrices`."""
    return model.matrix_axes()


def parameter_roles(model: LanguageModel) -> PyTree:
    """Return `model.parameter_roles()`. Pass this function to `ParameterGroups` as its `roles`."""
    return model.parameter_roles()


def hyperball_matrices(model: LanguageModel) -> PyTree:
    """Return the matrices for `Hyperball`, as in Levanter: those in `matrix_axes()` and any untied output head."""
    head = MuonDimensionNumbers(1, 0)
    entries = matrices_tree(matrix_axes, model)
    return jax.tree.map(lambda role, entry: head if role == "head" else entry, model.parameter_roles(), entries)


def paths_on_hyperball(model: LanguageModel) -> set[str]:
    """Return the paths of arrays whose matrix norms `Hyperball` keeps constant, such as `blocks.mlp.c_fc.weight`.

    The model may be abstract.
    """
    named = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_named)
    views = matrix_views(hyperball_matrices, model)
    paths = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named)
    return {path for path, view in zip(paths, views, strict=True) if view is not None}


def abstract_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """Build a model with `jax.ShapeDtypeStruct`s in place of arrays."""
    return eqx.filter_eval_shape(config.build, vocab_size=vocab_size, key=jax.random.key(0))


def write_row(cache: NamedArray, row: jax.Array, new: NamedArray) -> NamedArray:
    """Return a cache [batch, position, ...] with the first positions of one row replaced by `new`, [position, ...]."""
    # Select with a mask: rows may be sharded, and indexing a row would gather the whole array on each device.
    here = {"position": slice(0, new.resolve_axis("position").size)}
    chosen = hax.where(hax.arange(cache.resolve_axis("batch")) == row, new, cache[here])
    return cache.at[here].set(chosen.rearrange(cache.axes))


def _is_layer(x: object) -> bool:
    return isinstance(x, hnn.Linear | hnn.Embedding)


def count_parameters(model: PyTree) -> int:
    """Return the number of floating-point parameters, including vocabulary padding. Leaves may be abstract arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, _is_float)))


def _is_float(x: object) -> bool:
    return eqx.is_inexact_array(x) or (isinstance(x, jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact))
