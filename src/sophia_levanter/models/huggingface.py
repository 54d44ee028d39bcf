"""GPT-2 weights by the names that transformers and nanoGPT give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray

from sophia_levanter.config.model import Gpt2Config
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.models.saved_weights import plain_names, shown

_PREFIX = "transformer."
_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LAYOUTS = ("conv1d", "linear")


def gpt2_from_state_dict(config: Gpt2Config, arrays: Mapping[str, np.ndarray], *, layout: str = "conv1d") -> Gpt2:
    """A model with the given weights. Attention masks are ignored. The output head is the token embedding: one of
    `lm_head.weight` and `wte.weight` is enough.

    Args:
        config: the model's shape.
        arrays: by state-dict name, with or without `transformer.`, `model.`, `module.` and `_orig_mod.`.
        layout: `conv1d` for matrices [in, out], as transformers stores them; `linear` for torch.nn.Linear's [out, in],
            as nanoGPT and the Sophia authors do.

    Raises:
        ValueError: if arrays are missing, unknown, there twice or of another shape, or the head is another one; names
            them.
    """
    return jax.tree.map(jnp.asarray, gpt2_on_host(config, arrays, layout=layout))


def gpt2_on_host(
    config: Gpt2Config, arrays: Mapping[str, np.ndarray], *, layout: str = "conv1d", vocab_size: int | None = None
) -> Gpt2:
    """`gpt2_from_state_dict` with numpy arrays for leaves, for a model that no single device can hold.

    Args:
        config: the model's shape.
        arrays: by state-dict name.
        layout: of matrices.
        vocab_size: classes that can be predicted; the rows of the token embedding if not given. Rows beyond
            `config.embedding_rows(vocab_size)` are left out.
    """
    _check_layout(layout)
    given = {plain: np.asarray(arrays[name]) for plain, name in plain_names(arrays).items()}
    given["wte.weight"] = _tied_embedding(given, config)
    rows = given["wte.weight"].shape[0]
    vocab_size = rows if vocab_size is None else vocab_size
    template = eqx.filter_eval_shape(Gpt2.init, config, vocab_size=vocab_size, key=jax.random.key(0))
    wanted = _names(template)
    _check_same(
        {name: _shape(name, shape, layout, rows) for name, shape in wanted.items()},
        {name: array.shape for name, array in given.items()},
    )
    given["wte.weight"] = given["wte.weight"][: config.embedding_rows(vocab_size)]

    def load(name: str, leaf: NamedArray) -> NamedArray:
        if "blocks." not in name:
            array = given[name]
            padding = leaf.array.shape[0] - array.shape[0]
            return _filled(leaf, np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)))
        layers = [given[name.replace("blocks", f"h.{i}")] for i in range(config.num_layers)]
        if layout == "linear" and _is_matrix(name):
            layers = [a.T for a in layers]
        return _filled(leaf, np.stack(layers))

    return _map_named(load, template)


def _tied_embedding(given: dict[str, np.ndarray], config: Gpt2Config) -> np.ndarray:
    """The token embedding, which the output head must be; the head is taken out of `given`."""
    head = given.pop("lm_head.weight", None)
    embedding = given.get("wte.weight", head)
    if embedding is None:
        raise ValueError("wte.weight is missing: this is no GPT-2 state dict")
    if head is not None and not np.array_equal(head, embedding):
        shapes = "" if head.shape == embedding.shape else f" in its shape, {head.shape} and {embedding.shape}"
        raise ValueError(
            f"lm_head.weight differs from wte.weight{shapes}: the output head is not tied, and this model's output "
            "head is its token embedding; use weights with tied embeddings"
        )
    if embedding.ndim != 2:
        raise ValueError(f"wte.weight has shape {embedding.shape}, this model wants (vocab, {config.embed_dim})")
    return embedding


def _check_same(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Whether arrays have the names and the shapes of a model's; names what differs."""
    missing, unknown = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    differences = [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {what}"
        for names, what in ((missing, "missing"), (unknown, "not in this model"))
        if names
    ]
    if differences:
        raise ValueError("; ".join(differences))
    wrong = [name for name in wanted if given[name] != wanted[name]]
    if not wrong:
        return
    others = f"; {_listed(wrong[1:])} too" if wrong[1:] else ""
    if all(_is_matrix(name) and given[name] == wanted[name][::-1] for name in wrong):
        others += "; these matrices are transposed: torch.nn.Linear has [out, in], transformers' Conv1D [in, out]"
    raise ValueError(f"{wrong[0]} has shape {given[wrong[0]]}, this model wants {wanted[wrong[0]]}{others}")


def _listed(names: Sequence[str], longest: int = 4) -> str:
    listed = ", ".join(shown(name) for name in names[:longest])
    return f"{listed} and {len(names) - longest:,} more" if len(names) > longest else listed


def gpt2_to_state_dict(model: Gpt2, *, layout: str = "conv1d") -> dict[str, np.ndarray]:
    """The weights by state-dict name, the vocabulary without padding but with the rows that `config.vocab_rows` keeps;
    the inverse of `gpt2_from_state_dict`.

    Raises:
        ValueError: if the layout is unknown.
    """
    _check_layout(layout)
    arrays: dict[str, np.ndarray] = {}

    def save(name: str, leaf: NamedArray) -> NamedArray:
        array = np.asarray(leaf.array)
        if "blocks." not in name:
            rows = model.config.embedding_rows(model.vocab_size)
            arrays[_PREFIX + name] = array[:rows] if name == "wte.weight" else array
            return leaf
        for i, layer in enumerate(array):
            full = _PREFIX + name.replace("blocks", f"h.{i}")
            if _is_matrix(name):
                flat = layer.reshape(_matrix_shape(name, model.config))
                arrays[full] = flat.T if layout == "linear" else flat
            else:
                arrays[full] = layer.reshape(-1)
        return leaf

    _map_named(save, model)
    return arrays


def with_biases(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict in conv1d layout with zeros for the biases that it lacks, as transformers' GPT-2 always has them."""
    biases = {
        name.removesuffix("weight") + "bias": np.zeros(array.shape[-1:], array.dtype)
        for name, array in arrays.items()
        if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight"))
    }
    return biases | dict(arrays)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")


def _map_named(function, model: Gpt2) -> Gpt2:  # type: ignore[no-untyped-def]
    def visit(path: tuple, leaf: object) -> object:
        if not isinstance(leaf, NamedArray):
            return leaf
        name = ".".join(key.name for key in path if key.name not in ("stacked",))
        return function(name, leaf)

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=lambda x: isinstance(x, NamedArray))


def _names(model: Gpt2) -> dict[str, tuple[int, ...]]:
    """The shape of every array by state-dict name, in conv1d layout and with the padded vocabulary."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, leaf: NamedArray) -> NamedArray:
        shape = tuple(axis.size for axis in leaf.axes)
        if "blocks." not in name:
            shapes[name] = shape
        for i in range(model.config.num_layers if "blocks." in name else 0):
            flat = _matrix_shape(name, model.config) if _is_matrix(name) else (int(np.prod(shape[1:])),)
            shapes[name.replace("blocks", f"h.{i}")] = flat
        return leaf

    _map_named(note, model)
    return shapes


def _shape(name: str, shape: tuple[int, ...], layout: str, vocab_size: int) -> tuple[int, ...]:
    if name == "wte.weight":
        return (vocab_size, *shape[1:])
    return shape[::-1] if layout == "linear" and _is_matrix(name) else shape


def _is_matrix(name: str) -> bool:
    return name.endswith(tuple(f"{m}.weight" for m in _MATRICES))


def _matrix_shape(name: str, config: Gpt2Config) -> tuple[int, int]:
    embed, mlp = config.embed_dim, config.embed_dim * config.mlp_ratio
    if "attn.c_attn" in name:
        return embed, 3 * embed
    if "attn.c_proj" in name:
        return embed, embed
    return (embed, mlp) if "mlp.c_fc" in name else (mlp, embed)


def _filled(leaf: NamedArray, array: np.ndarray) -> NamedArray:
    return NamedArray(array.reshape([axis.size for axis in leaf.axes]), leaf.axes)
