"""State dicts: weights keyed by the names that transformers and nanoGPT use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray
from haliax.util import ensure_tuple

from sophia_levanter.config.model import Gpt2Config, TransformerConfig
from sophia_levanter.interop.architectures import architecture_of, shown
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.models.language_model import abstract_model

LAYOUTS = ("conv1d", "linear")
HEAD = "lm_head.weight"
# Name components added by torch.compile, data-parallel training, FSDP and wrapper modules.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "transformer"}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # causal masks and rotary frequencies


def gpt2_from_state_dict(config: Gpt2Config, arrays: Mapping[str, np.ndarray], *, layout: str = "conv1d") -> Gpt2:
    """Build a GPT-2 model with the given weights.

    Attention masks are ignored. The head is tied to the embedding, so either `lm_head.weight` or `wte.weight` suffices.

    Args:
        config: the shape of the model.
        arrays: the weights, keyed by state-dict name with or without the prefixes `transformer.`, `model.`, `module.`
            and `_orig_mod.`.
        layout: `conv1d` for matrices [in, out], as in transformers; `linear` for torch.nn.Linear's [out, in], as in
            nanoGPT and the Sophia authors' code.

    Raises:
        ValueError: if arrays are missing, unknown or given twice, if they have the wrong shape, or if the head differs
            from the token embedding; the message names the arrays.
    """
    return jax.tree.map(jnp.asarray, model_on_host(config, arrays, layout=layout))


def gpt2_to_state_dict(model: Gpt2, *, layout: str = "conv1d") -> dict[str, np.ndarray]:
    """Return the state dict of a GPT-2 model (see `to_state_dict`). This is the inverse of `gpt2_from_state_dict`.

    Raises:
        ValueError: if the layout is unknown.
    """
    return to_state_dict(model, layout=layout)


def model_on_host(
    config: TransformerConfig,
    arrays: Mapping[str, np.ndarray],
    *,
    layout: str | None = None,
    vocab_size: int | None = None,
) -> Any:
    """Build a model with the given weights as numpy arrays, because it may be too large for a single device.

    Args:
        config: the shape of the model.
        arrays: the weights, keyed by state-dict name with or without wrapper prefixes.
        layout: the matrix layout, `conv1d` or `linear`; by default, the layout that transformers uses for the model.
        vocab_size: the number of token ids that can be predicted; by default, the number of token embedding rows. Rows
            beyond `config.embedding_rows(vocab_size)` are dropped.

    Raises:
        ValueError: under the same conditions as `gpt2_from_state_dict`.
    """
    architecture = architecture_of(config)
    given = {plain: np.asarray(arrays[name]) for plain, name in plain_names(arrays).items()}
    embedding = architecture.embedding
    rows_of = given.get(embedding, given.get(HEAD))
    if rows_of is None:
        raise ValueError(f"{embedding} is missing: this is not a {architecture.title} state dict")
    rows = (rows_of.shape or (1,))[0]
    template = abstract_model(config, vocab_size or rows)
    names = _Names(template, layout)
    wanted = names.shapes(rows)
    if HEAD not in wanted:
        _tie(given, embedding)
    _check_same(wanted, {name: array.shape for name, array in given.items()}, names)

    def load(path: tuple, leaf: object) -> object:
        if not isinstance(leaf, NamedArray):
            return leaf
        name = _name(path)
        if not name.startswith("blocks."):
            array = given[name]
            if "vocab" in [axis.name for axis in leaf.axes]:
                array = array[: config.embedding_rows(vocab_size or rows)]
                array = np.pad(array, [(0, leaf.array.shape[0] - array.shape[0]), (0, 0)])
        else:
            layers = [given[names.of_layer(name, i)] for i in range(config.num_layers)]
            array = np.stack([a.T for a in layers] if names.is_transposed(name) else layers)
        return NamedArray(array.reshape([axis.size for axis in leaf.axes]), leaf.axes)

    return jax.tree_util.tree_map_with_path(load, template, is_leaf=lambda x: isinstance(x, NamedArray))


def to_state_dict(model: Any, *, layout: str | None = None) -> dict[str, np.ndarray]:
    """Return the weights of a model, keyed by state-dict name.

    Vocabulary padding is removed, except for the rows that `config.vocab_rows` adds. The factors of
    `parametrization: mup` are not applied; `export_model` multiplies the weights by them.

    Args:
        model: a `Gpt2` or a `Llama`.
        layout: the matrix layout, `conv1d` or `linear`; by default, the layout that transformers uses for the model.

    Raises:
        ValueError: if the layout is unknown.
        InputError: if transformers has no equivalent model.
    """
    names = _Names(model, layout)
    shapes = names.shapes(model.config.embedding_rows(model.vocab_size))
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in _parts(model, NamedArray):
        array = np.asarray(leaf.array)
        if not name.startswith("blocks."):
            arrays[names.full(name)] = array[: shapes[name][0]]
            continue
        transposed = names.is_transposed(name)
        for i in range(len(array)):
            plain = names.of_layer(name, i)
            layer = array[i].reshape(shapes[plain][::-1] if transposed else shapes[plain])
            arrays[names.full(plain)] = layer.T if transposed else layer
    return arrays


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the given names, keyed by the names without wrapper components. Buffers are skipped.

    Raises:
        ValueError: if two names refer to the same array.
    """
    given: dict[str, str] = {}
    for name in names:
        if name.endswith(BUFFERS):
            continue
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in given:
            raise ValueError(
                f"{shown(given[plain])} and {shown(name)} both refer to {shown(plain)}; remove one of them"
            )
        given[plain] = name
    return given


class _Names:
    """The names and shapes of a model's arrays in a state dict."""

    def __init__(self, model: Any, layout: str | None) -> None:
        self.model, self.architecture = model, architecture_of(model.config)
        self.layout = layout or self.architecture.layout
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
        # The number of input axes of each linear layer's weight, keyed by the name of the weight in this package.
        self.inputs = {f"{name}.weight": len(ensure_tuple(layer.In)) for name, layer in _parts(model, hnn.Linear)}

    def of_layer(self, name: str, layer: int) -> str:
        return name.replace("blocks", f"{self.architecture.layers}.{layer}", 1)

    def full(self, plain: str) -> str:
        return plain if plain == HEAD else self.architecture.prefix + plain

    def is_transposed(self, name: str) -> bool:
        return self.layout == "linear" and name in self.inputs

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array, keyed by its name without prefixes, for an embedding with `rows` rows."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, leaf in _parts(self.model, NamedArray):
            shape = tuple(rows if axis.name == "vocab" else axis.size for axis in leaf.axes)
            if not name.startswith("blocks."):
                shapes[name] = shape
                continue
            per_layer: tuple[int, ...] = (math.prod(shape[1:]),)
            if name in self.inputs:
                border = 1 + self.inputs[name]
                per_layer = math.prod(shape[1:border]), math.prod(shape[border:])
            for i in range(shape[0]):
                shapes[self.of_layer(name, i)] = per_layer[::-1] if self.is_transposed(name) else per_layer
        return shapes

    def is_matrix(self, plain: str) -> bool:
        prefix = f"{self.architecture.layers}."
        return any(plain.startswith(prefix) and plain.endswith(name.removeprefix("blocks")) for name in self.inputs)


def _tie(given: dict[str, np.ndarray], embedding: str) -> None:
    """Remove the output head from `given`. It replaces a missing token embedding; otherwise, both must be equal."""
    head = given.pop(HEAD, None)
    array = given.setdefault(embedding, head)  # type: ignore[arg-type]
    if head is not None and not np.array_equal(head, array):
        shapes = "" if head.shape == array.shape else f" in shape ({head.shape} and {array.shape})"
        raise ValueError(
            f"{HEAD} differs from {embedding}{shapes}: the output head is not tied, but this model ties it to the "
            "token embedding; use weights with tied embeddings"
        )


def _check_same(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], names: _Names) -> None:
    """Check that the arrays have the model's names and shapes. Raise a `ValueError` that lists any differences."""
    missing, unknown = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    differences = [
        f"{_listed(found)} {'is' if len(found) == 1 else 'are'} {what}"
        for found, what in ((missing, "missing"), (unknown, "not in this model"))
        if found
    ]
    if differences:
        raise ValueError("; ".join(differences))
    wrong = [name for name in wanted if given[name] != wanted[name]]
    if not wrong:
        return
    others = f"; also wrong: {_listed(wrong[1:])}" if wrong[1:] else ""
    if all(names.is_matrix(name) and given[name] == wanted[name][::-1] for name in wrong):
        others += "; these matrices are transposed: torch.nn.Linear has [out, in], transformers' Conv1D has [in, out]"
    raise ValueError(f"{wrong[0]} has shape {given[wrong[0]]}, but this model expects {wanted[wrong[0]]}{others}")


def _listed(names: Sequence[str], longest: int = 4) -> str:
    listed = ", ".join(shown(name) for name in names[:longest])
    return f"{listed} and {len(names) - longest:,} more" if len(names) > longest else listed


def _parts(model: Any, kind: type) -> list[tuple[str, Any]]:
    """Return the parts of a model that have the type `kind`, with their names."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, kind))
    return [(_name(path), leaf) for path, leaf in leaves if isinstance(leaf, kind)]


def _name(path: tuple) -> str:
    return ".".join(key.name for key in path if key.name != "stacked")
