"""Models in files, described before they are read: a Hugging Face folder, or a checkpoint of nanoGPT or the Sophia
authors.

Nothing that a file holds is ever run: safetensors has arrays only, and torch loads tensors and plain values only.
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

from sophia_levanter.data.names import TRAINED_TOKENIZER
from sophia_levanter.errors import InputError
from sophia_levanter.files import NotRegular, check_regular, read_regular
from sophia_levanter.printing import one_line, shortened

# Parts of names that torch.compile, data-parallel training, FSDP and modules around the model add.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "transformer"}
_LONGEST_NAME = 100
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_FLOATS = ("F16", "BF16", "F32", "F64")
# nanoGPT's epsilon is in its code, not in its checkpoints.
_NANOGPT_EPSILON = 1e-5
# What an exported folder has of its own: a field of config.json, and a tokenizer that has no name elsewhere.
OWN_FIELD = "sophia_levanter"
TOKENIZER_FILE = f"tokenizer{TRAINED_TOKENIZER}"
_NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


class WeightsError(InputError):
    """Something is wrong with a file of weights, whose name the message begins with."""


@dataclass(frozen=True)
class SavedModel:
    """A model in a file. Only its description has been read so far.

    Attributes:
        file: the file or folder.
        fields: what the fields of a Gpt2Config must be for it.
        vocab_size: rows of its token embedding.
        layout: of its matrices, as for `gpt2_from_state_dict`.
        arrays: its (name, array), by `plain_names`; each is read when its turn comes.
        tokenizer: what `data.tokenizer` was for it, where the file tells.
        tokenizer_fingerprint: of that tokenizer.
    """

    file: Path
    fields: dict[str, Any]
    vocab_size: int
    layout: str
    arrays: Iterator[tuple[str, np.ndarray]]
    tokenizer: str | None = None
    tokenizer_fingerprint: str | None = None


def open_model(path: Path) -> SavedModel:
    """The model in a folder of transformers, or in a `ckpt.pt` of nanoGPT or the Sophia authors.

    Raises:
        InputError: if there is none, or it computes what `Gpt2` cannot; from `arrays` if one cannot be read.
    """
    if os.path.isdir(path):
        return _huggingface(path)
    try:
        check_regular(path)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise input_error(path, f"{reason}; name a folder of transformers' GPT-2, or nanoGPT's ckpt.pt") from None
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise input_error(path, f"name the folder, {path.parent}, which must hold config.json and model.safetensors")
    return _nanogpt(path)


def input_error(file: Path, text: str) -> WeightsError:
    """What is wrong with a file."""
    return WeightsError(f"{file}: {text}")


def shown(name: str, longest: int = _LONGEST_NAME) -> str:
    """A text from a file as a terminal can show it: control characters escaped, shortened."""
    return shortened(one_line(name), longest)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The given names by those of nanoGPT's GPT without the parts that wrappers add; causal masks are left out.

    Raises:
        ValueError: if two of them are of the same array.
    """
    given: dict[str, str] = {}
    for name in names:
        if name.endswith(_BUFFERS):
            continue
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in given:
            raise ValueError(f"{shown(given[plain])} and {shown(name)} are both {shown(plain)}; remove one of them")
        given[plain] = name
    return given


def _first_line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).splitlines()[0], 300)


def _value(file: Path, values: Mapping[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """`values[name]`, which must be of a kind, and a number above 0."""
    value: Any = values.get(name, default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is not bool and not value > 0):
        wanted = {bool: "true or false", int: "an integer above 0", float: "a number above 0"}[kind]
        raise input_error(file, f"{name} is {shown(repr(value))}; it must be {wanted}")
    return value


def _weights(
    file: Path, shapes: Mapping[str, tuple[int, ...]], described: Mapping[str, int], source: Path | str
) -> dict[str, str]:
    """`plain_names` of arrays, whose sizes must be the described ones: a model of another size is never built.

    Args:
        file: that holds them, for messages.
        shapes: by the name in the file.
        described: how many layers, rows, columns and positions there are, by what `source` calls them, in that order.
        source: the file with the description, for messages.
    """
    try:
        names = plain_names(shapes)
    except ValueError as error:
        raise input_error(file, str(error)) from None
    embedding = names.get("wte.weight", names.get("lm_head.weight"))
    if embedding is None:
        raise input_error(file, "wte.weight is missing: this is no GPT-2 state dict")
    layers = {found[1] for name in names if (found := re.match(r"h\.(\d+)\.", name))}
    # An array without these axes is refused by its shape, with the others.
    sizes = [len(layers), *(shapes[embedding] + (None, None))[:2], *shapes.get(names.get("wpe.weight", ""), ())[:1]]
    wrong = [
        f"{name} is {value}, and the weights have {size}"
        for (name, value), size in zip(described.items(), sizes, strict=False)
        if size not in (None, value)
    ]
    if wrong:
        raise input_error(
            file, f"{source} does not describe the weights: {'; '.join(wrong)}; both must be of one model"
        )
    return names


def _huggingface(folder: Path) -> SavedModel:
    file = folder / "config.json"
    if not os.path.exists(file):
        nano = f"; name {folder / 'ckpt.pt'}" if os.path.isfile(folder / "ckpt.pt") else ""
        raise input_error(folder, f"there is no config.json in it{nano or ', as transformers saves with GPT-2'}")
    values = read_json(file)
    if values.get("model_type") != "gpt2":
        raise input_error(file, f"model_type is {shown(repr(values.get('model_type')))}; only gpt2 is read")
    activation = values.get("activation_function", "gelu_new")
    if activation not in _TANH_GELUS:
        raise input_error(
            file,
            f"activation_function is {shown(repr(activation))}; this model computes {' alias '.join(_TANH_GELUS)}",
        )
    if values.get("scale_attn_weights", True) is not True:
        raise input_error(file, "scale_attn_weights is false; this model divides scores by the root of the heads' size")
    width = _value(file, values, "n_embd", int, 768)
    inner = 4 * width if values.get("n_inner") is None else _value(file, values, "n_inner", int)
    if inner % width:
        raise input_error(
            file, f"n_inner is {inner}, which is no multiple of n_embd {width}; model.mlp_ratio is an integer"
        )
    # What config.json leaves out has the default of transformers' GPT2Config.
    described = {
        "n_layer": _value(file, values, "n_layer", int, 12),
        "vocab_size": _value(file, values, "vocab_size", int, 50257),
        "n_embd": width,
        "n_positions": _value(file, values, "n_positions", int, 1024),
    }
    own, arrays = _own_values(file, values), _safetensors(_shards(folder))
    names = _weights(folder, {name: array.shape for name, array in arrays.items()}, described, "config.json")

    def read(suffix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        return ((plain, arrays[name].read()) for plain, name in names.items() if plain.endswith(suffix))

    # transformers' GPT-2 always has biases. Those of a model without are 0, until it is trained on elsewhere.
    use_bias = own["use_bias"] or any(array.any() for _, array in read(".bias"))
    return SavedModel(
        file=folder,
        fields={
            "num_layers": described["n_layer"],
            "num_heads": _value(file, values, "n_head", int, 12),
            "embed_dim": width,
            "seq_len": described["n_positions"],
            "mlp_ratio": inner // width,
            "use_bias": use_bias,
            "scale_attn_by_inverse_layer_idx": _value(file, values, "scale_attn_by_inverse_layer_idx", bool, False),
            "layer_norm_epsilon": _value(file, values, "layer_norm_epsilon", float, 1e-5),
        },
        vocab_size=described["vocab_size"],
        layout="conv1d",
        arrays=read(),
        tokenizer=str(folder / TOKENIZER_FILE) if own["tokenizer"] == TOKENIZER_FILE else own["tokenizer"],
        tokenizer_fingerprint=own["tokenizer_fingerprint"],
    )


def _own_values(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What this package's export says of the model, in whatever folder."""
    own = values.get(OWN_FIELD, {})
    kinds = {"use_bias": (bool, True), "tokenizer": (str, None), "tokenizer_fingerprint": (str, None)}
    if (
        not isinstance(own, dict)
        or any(name in own and type(own[name]) is not kinds[name][0] for name in kinds)
        # A file of its own is in the folder; no other is read.
        or (own.get("tokenizer", "").endswith(TRAINED_TOKENIZER) and own["tokenizer"] != TOKENIZER_FILE)
    ):
        raise input_error(file, f"{OWN_FIELD} is not what an export writes; take it out, and name --data.tokenizer")
    return {name: own.get(name, default) for name, (_, default) in kinds.items()}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `WeightsError` if there is none."""
    try:
        values = json.loads(read_regular(file))
    except NotRegular as error:
        raise input_error(file, f"{error.strerror}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise input_error(file, f"is no JSON: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise input_error(file, "is no JSON object")
    return values


def _shards(folder: Path) -> list[Path]:
    if os.path.exists(folder / "model.safetensors"):
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if os.path.exists(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise input_error(index, "has no weight_map from names to files")
        for name in names.values():
            if Path(name).name != name or name in ("", "..") or "\0" in name:
                raise input_error(
                    index, f"names {shown(repr(name))}, which is not a file in its folder; download the index again"
                )
        return [folder / name for name in sorted(set(names.values()))]
    if list(folder.glob("pytorch_model*.bin*")):
        raise input_error(
            folder,
            "there is pytorch_model.bin and no model.safetensors, and pickles are not read, since they may run code; "
            "save_pretrained of a current transformers writes model.safetensors",
        )
    raise input_error(folder, "there is neither model.safetensors nor model.safetensors.index.json in it")


class _Array(NamedTuple):
    """An array in a file. Only its shape has been read so far."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        with _opened(self.file) as opened:
            return opened.get_tensor(self.name)


def _safetensors(files: Iterable[Path]) -> dict[str, _Array]:
    """The weights in files by their names there."""
    arrays: dict[str, _Array] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # it has nothing else of a mapping
                if name.endswith(_BUFFERS):
                    continue
                part = opened.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    raise input_error(
                        file, f"{shown(name)} is {part.get_dtype()}; it must be one of {', '.join(_FLOATS)}"
                    )
                if name in arrays:
                    raise input_error(
                        file, f"{shown(name)} is in {arrays[name].file.name} too; remove one of the files"
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
        raise input_error(file, f"is missing, damaged or not whole: {_first_line(error)}; download it again") from None


def _nanogpt(file: Path) -> SavedModel:
    checkpoint = _torch_load(file)
    values, tensors = (checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in ("model_args", "model"))
    if not isinstance(values, dict) or not isinstance(tensors, dict):
        raise input_error(file, "is no checkpoint of nanoGPT or the Sophia authors, a dict with model and model_args")
    # Forks of nanoGPT say here that they compute something else.
    known = (*_NANOGPT_ARGS, "scale_attn_by_inverse_layer_idx")
    for name, value in values.items():
        if name not in known and value is not None and value is not False:
            raise input_error(
                file, f"model_args has {shown(str(name))} {shown(repr(value))}, which this model does not have"
            )
    described = {name: _value(file, values, name, int) for name in ("n_layer", "vocab_size", "n_embd", "block_size")}
    shapes = {name: _shape(file, name, tensor) for name, tensor in tensors.items() if not str(name).endswith(_BUFFERS)}
    names = _weights(file, shapes, described, "model_args")
    return SavedModel(
        file=file,
        fields={
            "num_layers": described["n_layer"],
            "num_heads": _value(file, values, "n_head", int),
            "embed_dim": described["n_embd"],
            "seq_len": described["block_size"],
            "mlp_ratio": 4,
            "use_bias": _value(file, values, "bias", bool),
            "scale_attn_by_inverse_layer_idx": _value(file, values, "scale_attn_by_inverse_layer_idx", bool, False),
            "layer_norm_epsilon": _NANOGPT_EPSILON,
        },
        vocab_size=described["vocab_size"],
        layout="linear",
        # numpy has no bfloat16 that torch knows of.
        arrays=((plain, tensors[name].detach().float().numpy()) for plain, name in names.items()),
    )


def _torch_load(file: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise input_error(
            file,
            f"is read by torch, which cannot be imported ({_first_line(error)}); pip install torch: "
            "it loads tensors and plain values, and code pickled in the file is never run",
        ) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no common one
        if "weights_only" in str(error):
            # What torch says goes on with how to run the file's code.
            reason = "holds more than tensors and plain values, and code pickled in a file is never run"
        else:
            reason = f"torch cannot load it: {_first_line(error)}"
        raise input_error(file, f"{reason}; name the ckpt.pt of nanoGPT or the Sophia authors") from None


def _shape(file: Path, name: Any, tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor whose numbers are all in the file."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise input_error(file, f"model has {shown(repr(name))}, which is not a named tensor")
    if not tensor.is_floating_point():
        raise input_error(file, f"{shown(name)} is {tensor.dtype}; it must be floating-point")
    # What is not stored, or a few stored numbers over and over, could be of any size.
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise input_error(file, f"{shown(name)} is a {kind} tensor; save it as a dense one (tensor.to_dense())")
    repeats = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if repeats or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise input_error(
            file, f"{shown(name)} has shape {tuple(tensor.shape)} and repeats fewer numbers; save tensor.clone()"
        )
    return tuple(tensor.shape)
