"""Loading pretrained weights from files, for runs that start from an existing model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.config.model import VOCAB_MULTIPLE, ModelConfig, TransformerConfig, pad_vocab
from sophia_levanter.data.bpe import bytes_of_characters
from sophia_levanter.data.tokenizer import VOCAB_SIZES, Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.interop.architectures import input_error, shown
from sophia_levanter.interop.saved_weights import SavedModel, open_model, read_json
from sophia_levanter.interop.state_dict import model_on_host
from sophia_levanter.models.transformer import Transformer


def read_pretrained(
    path: str, config: ModelConfig, tokenizer: Tokenizer, *, dtype: str, report: Callable[[str], None]
) -> Transformer:
    """Read a model from a file into host memory.

    If the vocabulary is padded to a multiple of 128, as in nanoGPT, the padding is dropped. Other embedding rows that
    the tokenizer does not use, such as the row for an added padding token, are kept but never predicted;
    `config.vocab_rows` of the result includes them. If `config` specifies no biases, the biases that transformers
    always saves must be 0.

    Args:
        path: a folder saved by transformers, with `config.json` and `model.safetensors` or its shards; or a `ckpt.pt`
            from nanoGPT or the Sophia authors.
        config: the shape of the model, which must match the file.
        tokenizer: the tokenizer of the model. If the file contains a fingerprint, it must match this tokenizer.
        dtype: the dtype of the parameters.
        report: called with each message for the user.

    Returns:
        The model, with numpy arrays as leaves.

    Raises:
        InputError: if the file cannot be read, does not fit the model or the tokenizer, or contains non-finite values.
    """
    saved, vocab_size = open_model(Path(path)), tokenizer.vocab_size
    if not isinstance(config, saved.architecture.config_class):
        kind, wanted = (config.get_choice_name(c) for c in (type(config), saved.architecture.config_class))
        raise input_error(
            saved.file,
            f"contains a {saved.architecture.title} model, but model.type is {kind}; set --model.type {wanted}",
        )
    _check_fields(saved, config)
    if config.seq_len > saved.seq_len:
        report(f"model.seq_len {config.seq_len} exceeds the {saved.seq_len} positions in {saved.file}")
    config = _with_rows(saved, config, tokenizer)
    arrays = {name: _finite(saved.file, name, array, dtype) for name, array in saved.arrays}
    if not getattr(config, "use_bias", True):
        arrays = _without_biases(saved, arrays)
    try:
        model = model_on_host(config, arrays, layout=saved.architecture.layout, vocab_size=vocab_size)
    except ValueError as error:
        raise input_error(saved.file, str(error)) from None
    if saved.vocab_size > vocab_size:
        more = "padding, which is dropped"
        if config.vocab_rows is not None:
            more = f"{saved.vocab_size - vocab_size:,} more, which are kept but never predicted"
        report(
            f"the embedding has {saved.vocab_size:,} rows: {vocab_size:,} for the tokens of "
            f"data.tokenizer {tokenizer.name} and {more}"
        )
    return model


def check_vocabulary(path: str, tokenizer: Tokenizer) -> None:
    """Compare the ids of a tokenizer with any `vocab.json` and `tokenizer.json` in a folder saved by transformers.

    Raises:
        InputError: if the ids differ; the message names the first difference.
    """
    for name in ("vocab.json", "tokenizer.json"):
        file = Path(path, name)
        if not file.is_file():
            continue
        vocab: Any = read_json(file)
        if name == "tokenizer.json":
            vocab = vocab["model"].get("vocab") if isinstance(vocab.get("model"), dict) else None
        if not isinstance(vocab, dict) or not all(type(token) is int for token in vocab.values()):
            raise input_error(
                file,
                "contains no token-to-id mapping; remove the file if it does not belong to the model's tokenizer",
            )
        byte_of = bytes_of_characters()
        for text, token in sorted(vocab.items(), key=lambda item: item[1]):
            # Skip added tokens, whose ids are outside the vocabulary of the tokenizer.
            if 0 <= token < tokenizer.vocab_size and tokenizer.special_tokens.get(text) != token:
                ours = tokenizer.token_bytes[token]
                if bytes(byte_of.get(character, 0) for character in text) != ours:
                    raise input_error(
                        file,
                        f"token {token} is {shown(repr(text))}, but {ours!r} in data.tokenizer {tokenizer.name}; "
                        "specify the tokenizer that the model was trained with, or remove the file if it does not "
                        "belong to the model",
                    )


def _check_fields(saved: SavedModel, config: ModelConfig) -> None:
    if set(config.forward_factors().values()) - {1.0}:
        raise InputError(
            f"model.parametrization is 'mup', but {saved.file} contains the weights of a standard model; "
            "set --model.parametrization standard"
        )
    config = config.explicit()
    wrong = {name: value for name, value in saved.fields.items() if getattr(config, name) != value}
    if not wrong or (set(wrong) == {"use_bias"} and saved.architecture.layout == "conv1d"):
        return  # biases from transformers are checked when they are read
    name, value = next(iter(wrong.items()))
    options = " ".join(f"--model.{name} {_shown(value)}" for name, value in wrong.items())
    ours = _shown(getattr(config, name))
    raise InputError(f"model.{name} is {ours}, but {saved.file} has {_shown(value)}; set {options}")


def _without_biases(saved: SavedModel, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if name.endswith(".bias") and array.any():
            raise InputError(
                f"model.use_bias is false, but {saved.file} has nonzero biases ({shown(name)}); "
                "set --model.use_bias true"
            )
    return {name: array for name, array in arrays.items() if not name.endswith(".bias")}


def _with_rows(saved: SavedModel, config: TransformerConfig, tokenizer: Tokenizer) -> TransformerConfig:
    """Return the configuration, with `vocab_rows` set if the file has extra embedding rows other than padding."""
    if saved.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise InputError(
            f"data.tokenizer {tokenizer.name} differs from the one that {saved.file} was trained with; "
            f"set --data.tokenizer {shown(str(saved.tokenizer))}"
        )
    rows, vocab_size = saved.vocab_size, tokenizer.vocab_size
    if rows >= vocab_size and config.vocab_rows is not None:
        if rows != config.vocab_rows:
            raise InputError(
                f"model.vocab_rows is {config.vocab_rows}, but {saved.file} has {rows}; set --model.vocab_rows {rows}"
            )
        return config
    if rows in (vocab_size, pad_vocab(vocab_size)):
        return config
    known = {size: name for name, size in reversed(VOCAB_SIZES.items())} | {pad_vocab(50257): "gpt2"}
    # A larger difference indicates a different vocabulary rather than added tokens and padding.
    if vocab_size < rows < vocab_size + max(VOCAB_MULTIPLE, vocab_size // 20) and rows not in known:
        return dataclasses.replace(config, vocab_rows=rows)
    keep = f", or --model.vocab_rows {rows} to keep {rows - vocab_size} rows that are never predicted"
    raise InputError(
        f"data.tokenizer {tokenizer.name} has {vocab_size} tokens, but {saved.file} has {rows} embedding rows, "
        f"{abs(rows - vocab_size)} {'more' if rows > vocab_size else 'fewer'}; "
        f"set --data.tokenizer {known.get(rows, 'to the tokenizer of the model')}" + (keep if rows > vocab_size else "")
    )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _finite(file: Path, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise input_error(
            file, f"{shown(name)} contains values that are not finite in {dtype}; use weights from an earlier step"
        )
    return cast
