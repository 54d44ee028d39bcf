"""Reading models from folders saved by transformers, and from checkpoints of nanoGPT or the Sophia authors.

The description of a model is read before its weights. Code in a file is never run: safetensors files contain only
arrays, and torch loads only tensors and plain values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sophia_levanter.data.tokenizer import TRAINED_TOKENIZER
from sophia_levanter.files import NotRegular, check_regular, read_regular
from sophia_levanter.interop.architectures import (
    NANOGPT,
    Architecture,
    Description,
    architecture_of_type,
    input_error,
    shown,
)
from sophia_levanter.interop.state_dict import BUFFERS, HEAD, plain_names

_FLOATS = ("F16", "BF16", "F32", "F64")
# nanoGPT defines this epsilon in its code and does not save it in checkpoints.
_NANOGPT_EPSILON = 1e-5
# An export adds this field to config.json and, if the tokenizer was trained with train_tokenizer, this file.
OWN_FIELD = "sophia_levanter"
TOKENIZER_FILE = f"tokenizer{TRAINED_TOKENIZER}"
_SCALED = "scale_attn_by_inverse_layer_idx"  # only in the Sophia authors' checkpoints
_NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


@dataclass(frozen=True)
class SavedModel:
    """A model stored in a file. Only its description has been read so far.

    Attributes:
        file: the file or folder.
        architecture: the model's architecture.
        fields: the settings of `architecture.config_class` that the model requires.
        seq_len: the model's maximum context length.
        vocab_size: the number of rows in its token embedding.
        arrays: the (name, array) pairs of its weights, with names from `plain_names`; read one by one during iteration.
        tokenizer: the `data.tokenizer` that it was trained with, or None if the file does not specify it.
        tokenizer_fingerprint: the fingerprint of that tokenizer, or None.
    """

    file: Path
    architecture: Architecture
    fields: dict[str, Any]
    seq_len: int
    vocab_size: int
    arrays: Iterator[tuple[str, np.ndarray]]
    tokenizer: str | None = None
    tokenizer_fingerprint: str | None = None


def open_model(path: Path) -> SavedModel:
    """Open the model in a folder saved by transformers, or in a `ckpt.pt` from nanoGPT or the Sophia authors.

    Raises:
        InputError: if the path does not contain a supported model; later, during iteration over `arrays`, if an array
            cannot be read.
    """
    if os.path.isdir(path):
        return _huggingface(path)
    try:
        check_regular(path)
    except OSError as error:
        reason = "file not found" if isinstance(error, FileNotFoundError) else error.strerror
        raise input_error(path, f"{reason}; specify a folder saved by transformers, or nanoGPT's ckpt.pt") from None
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise input_error(
            path, f"specify its folder, {path.parent}, which must contain config.json and model.safetensors"
        )
    return _nanogpt(path)


def _first_line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).splitlines()[0], 300)


def _weights(
    file: Path, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, given: Description, source: str
) -> dict[str, str]:
    """Check the array sizes against the description before a model is built, and return the arrays' `plain_names`.

    `shapes` is keyed by the names in the file. `source` is the name of the description, for messages.
    """
    try:
        names = plain_names(shapes)
    except ValueError as error:
        raise input_error(file, str(error)) from None
    embedding = names.get(architecture.embedding, names.get(HEAD))
    if embedding is None:
        raise input_error(file, f"{architecture.embedding} is missing: this is not a {architecture.title} state dict")
    layers = {found[1] for name in names if (found := re.match(rf"{architecture.layers}\.(\d+)\.", name))}
    # An array without these axes is rejected later because of its shape.
    sizes = [len(layers), *(shapes[embedding] + (None, None))[:2], *shapes.get(names.get("wpe.weight", ""), ())[:1]]
    wrong = [
        f"{name} is {value}, but the weights have {size}"
        for (name, value), size in zip(architecture.sizes(given).items(), sizes, strict=False)
        if size not in (None, value)
    ]
    if wrong:
        raise input_error(
            file, f"{source} does not match the weights: {'; '.join(wrong)}; both must come from the same model"
        )
    return names


def _huggingface(folder: Path) -> SavedModel:
    file = folder / "config.json"
    if not os.path.exists(file):
        wanted = folder / "ckpt.pt" if os.path.isfile(folder / "ckpt.pt") else "a folder saved by transformers"
        raise input_error(folder, f"config.json is missing; specify {wanted}")
    given = Description(file, read_json(file))
    architecture = architecture_of_type(file, given.values.get("model_type"))
    fields = architecture.fields(given)
    own, arrays = _own_values(file, given.values), _safetensors(_shards(folder))
    shapes = {name: array.shape for name, array in arrays.items()}
    names = _weights(folder, shapes, architecture, given, "config.json")

    def read(suffix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        return ((plain, arrays[name].read()) for plain, name in names.items() if plain.endswith(suffix))

    if architecture.always_has_biases:
        # GPT-2 in transformers always has biases. For a model without biases, they are 0 unless it was trained further.
        fields["use_bias"] = own["use_bias"] or any(array.any() for _, array in read(".bias"))
    return SavedModel(
        file=folder,
        architecture=architecture,
        fields=fields,
        seq_len=architecture.seq_len(given),
        vocab_size=architecture.sizes(given)["vocab_size"],
        arrays=read(),
        tokenizer=str(folder / TOKENIZER_FILE) if own["tokenizer"] == TOKENIZER_FILE else own["tokenizer"],
        tokenizer_fingerprint=own["tokenizer_fingerprint"],
    )


def _own_values(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this package adds during export, or their defaults."""
    own = values.get(OWN_FIELD, {})
    kinds = {"use_bias": (bool, True), "tokenizer": (str, None), "tokenizer_fingerprint": (str, None)}
    if (
        not isinstance(own, dict)
        or any(name in own and type(own[name]) is not kinds[name][0] for name in kinds)
        # The file of a trained tokenizer must be the one in the folder.
        or (own.get("tokenizer", "").endswith(TRAINED_TOKENIZER) and own["tokenizer"] != TOKENIZER_FILE)
    ):
        raise input_error(file, f"the {OWN_FIELD} field is invalid; remove it and set --data.tokenizer")
    return {name: own.get(name, default) for name, (_, default) in kinds.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raise `WeightsError` if the file does not contain one."""
    try:
        values = json.loads(read_regular(file))
    except NotRegular as error:
        raise input_error(file, f"{error.strerror}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise input_error(file, f"not valid JSON: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise input_error(file, "not a JSON object")
    return values


def _shards(folder: Path) -> list[Path]:
    if os.path.exists(folder / "model.safetensors"):
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if os.path.exists(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise input_error(index, "has no weight_map that maps names to files")
        for name in names.values():
            if Path(name).name != name or name in ("", "..") or "\0" in name:
                raise input_error(
                    index,
                    f"refers to {shown(repr(name))}, which is not a file in the same folder; download the index again",
                )
        return [folder / name for name in sorted(set(names.values()))]
    if list(folder.glob("pytorch_model*.bin*")):
        raise input_error(
            folder,
            "found pytorch_model.bin but no model.safetensors; pickle files are not loaded, because they can run code; "
            "save the model again with save_pretrained from a recent version of transformers",
        )
    raise input_error(folder, "contains neither model.safetensors nor model.safetensors.index.json")


class _Array(NamedTuple):
    """An array in a file. Only its shape has been read so far."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        with _opened(self.file) as opened:
            return opened.get_tensor(self.name)


def _safetensors(files: Iterable[Path]) -> dict[str, _Array]:
    """Return the weights in safetensors files, keyed by their names in the files."""
    arrays: dict[str, _Array] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # it has no other mapping methods
                if name.endswith(BUFFERS):
                    continue
                part = opened.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    raise input_error(
                        file, f"{shown(name)} is {part.get_dtype()}; it must be one of {', '.join(_FLOATS)}"
                    )
                if name in arrays:
                    raise input_error(
                        file, f"{shown(name)} is also in {arrays[name].file.name}; remove one of the files"
                    )
                arrays[name] = _Array(file, name, tuple(part.get_shape()))
    return arrays


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        check_regular(file)
        with safe_open(file, "np") as opened:
            yield opened
    except NotRegular as error:
        raise input_error(file, f"{error.strerror}") from None
    except (OSError, SafetensorError) as error:
        raise input_error(file, f"missing, damaged or incomplete: {_first_line(error)}; download it again") from None


def _nanogpt(file: Path) -> SavedModel:
    checkpoint = _torch_load(file)
    values, tensors = (checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in ("model_args", "model"))
    if not isinstance(values, dict) or not isinstance(tensors, dict):
        raise input_error(
            file, "not a checkpoint from nanoGPT or the Sophia authors (a dict with the keys model and model_args)"
        )
    # Forks of nanoGPT record changes to the model here.
    known = (*_NANOGPT_ARGS, _SCALED)
    for name, value in values.items():
        if name not in known and value is not None and value is not False:
            raise input_error(
                file, f"model_args contains {shown(str(name))}={shown(repr(value))}, which this model does not support"
            )
    # These fields have no defaults. The epsilon comes from nanoGPT's code.
    named = {name: values.get(name) for name in _NANOGPT_ARGS} | {_SCALED: values.get(_SCALED, False)}
    given = Description(file, named | {"layer_norm_epsilon": _NANOGPT_EPSILON})
    fields = NANOGPT.fields(given) | {"use_bias": given.value("bias", bool)}
    shapes = {name: _shape(file, name, tensor) for name, tensor in tensors.items() if not str(name).endswith(BUFFERS)}
    names = _weights(file, shapes, NANOGPT, given, "model_args")
    return SavedModel(
        file=file,
        architecture=NANOGPT,
        fields=fields,
        seq_len=NANOGPT.seq_len(given),
        vocab_size=given.value("vocab_size", int),
        # torch cannot convert bfloat16 to numpy.
        arrays=((plain, tensors[name].detach().float().numpy()) for plain, name in names.items()),
    )


def _torch_load(file: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise input_error(
            file,
            f"requires torch, which cannot be imported ({_first_line(error)}); run pip install torch "
            "(only tensors and plain values are loaded; pickled code in the file is never run)",
        ) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's errors have no common base class
        if "weights_only" in str(error):
            # torch's own message would explain how to run code from the file.
            reason = "contains more than tensors and plain values, and pickled code is never run"
        else:
            reason = f"torch cannot load it: {_first_line(error)}"
        raise input_error(file, f"{reason}; specify a ckpt.pt from nanoGPT or the Sophia authors") from None


def _shape(file: Path, name: Any, tensor: Any) -> tuple[int, ...]:
    """Check that the file stores all values of a tensor, and return the shape of the tensor."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise input_error(file, f"model contains {shown(repr(name))}, which is not a named tensor")
    if not tensor.is_floating_point():
        raise input_error(file, f"{shown(name)} is {tensor.dtype}; it must be floating-point")
    # A tensor that is not stored, or that repeats a few stored values, could claim any size.
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise input_error(file, f"{shown(name)} is a {kind} tensor; save it as a dense tensor (tensor.to_dense())")
    repeats = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if repeats or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise input_error(
            file, f"{shown(name)} has shape {tuple(tensor.shape)} but stores fewer values; save tensor.clone() instead"
        )
    return tuple(tensor.shape)
