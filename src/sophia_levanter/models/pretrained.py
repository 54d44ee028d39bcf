"""GPT-2 weights from files as a model that a run can start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sophia_levanter.errors import InputError
from sophia_levanter.models.config import Gpt2Config, pad_vocab
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.models.huggingface import gpt2_on_host
from sophia_levanter.models.saved_weights import SavedModel, input_error, open_model


def read_gpt2(
    path: str,
    config: Gpt2Config,
    *,
    tokenizer: str,
    fingerprint: str,
    vocab_size: int,
    dtype: str,
    report: Callable[[str], None],
) -> Gpt2:
    """A model with the weights of a file, in this host's memory.

    A vocabulary that is padded to a multiple of 128, as nanoGPT's is, loses its padding. Where the model has no biases,
    those of a folder of transformers, which always has some, must be 0.

    Args:
        path: a folder with `config.json` and `model.safetensors` or its shards, as transformers saves GPT-2; or the
            `ckpt.pt` of nanoGPT or the Sophia authors.
        config: the model's shape, which must be the file's.
        tokenizer: the tokenizer's name, for messages.
        fingerprint: of the tokenizer, which must be the file's where that tells.
        vocab_size: the number of its tokens.
        dtype: of the parameters.
        report: takes a line of news for the user.

    Returns:
        A `Gpt2` with numpy arrays for leaves.

    Raises:
        InputError: if the file cannot be read, is of another model or vocabulary, has an output head of its own, or
            holds numbers that are not finite.
    """
    saved = open_model(Path(path))
    _check_fields(saved, config)
    _check_vocabulary(saved, tokenizer, fingerprint, vocab_size)
    arrays = {name: _finite(saved.file, name, array, dtype) for name, array in saved.arrays}
    if not config.use_bias:
        arrays = _without_biases(saved, arrays)
    embedding, head = arrays.get("wte.weight"), arrays.pop("lm_head.weight", None)
    if embedding is not None:
        if embedding.shape[:1] != (saved.vocab_size,):
            raise input_error(
                saved.file, f"wte.weight has shape {embedding.shape}, but vocab_size is {saved.vocab_size}"
            )
        if head is not None and not np.array_equal(head, embedding):
            raise input_error(
                saved.file,
                "lm_head.weight differs from wte.weight, and this model's output head is its token embedding; "
                "weights with tied embeddings would do",
            )
        arrays["wte.weight"] = embedding[:vocab_size]
    try:
        model = gpt2_on_host(config, arrays, layout=saved.layout)
    except ValueError as error:
        raise input_error(saved.file, str(error)) from None
    if saved.vocab_size > vocab_size:
        report(
            f"its vocabulary of {saved.vocab_size:,} is the {vocab_size:,} tokens of data.tokenizer {tokenizer} and "
            "padding, which is left out"
        )
    return model


def _check_fields(saved: SavedModel, config: Gpt2Config) -> None:
    wrong = {name: value for name, value in saved.fields.items() if getattr(config, name) != value}
    if not wrong or (set(wrong) == {"use_bias"} and saved.layout == "conv1d"):
        return  # whether biases of transformers' layout are any shows when they are read
    name, value = next(iter(wrong.items()))
    options = " ".join(f"--model.{name} {_shown(value)}" for name, value in wrong.items())
    ours = _shown(getattr(config, name))
    raise InputError(f"model.{name} is {ours}, and {saved.file} has {_shown(value)}; set {options}")


def _without_biases(saved: SavedModel, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if name.endswith(".bias") and array.any():
            raise InputError(
                f"model.use_bias is false, and {saved.file} has biases that are not 0 ({name}); "
                "set --model.use_bias true"
            )
    return {name: array for name, array in arrays.items() if not name.endswith(".bias")}


def _check_vocabulary(saved: SavedModel, tokenizer: str, fingerprint: str, vocab_size: int) -> None:
    if saved.tokenizer_fingerprint not in (None, fingerprint):
        raise InputError(
            f"data.tokenizer {tokenizer} is not the one that {saved.file} was trained with; "
            f"set --data.tokenizer {saved.tokenizer}"
        )
    if saved.vocab_size in (vocab_size, pad_vocab(vocab_size)):
        return
    gpt2 = saved.vocab_size in (50257, pad_vocab(50257))
    raise InputError(
        f"data.tokenizer {tokenizer} has {vocab_size} tokens, and {saved.file} has {saved.vocab_size}; "
        + ("set --data.tokenizer gpt2" if gpt2 else "set --data.tokenizer to the one that it was trained with")
    )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _finite(file: Path, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise input_error(
            file, f"{name} has numbers that are not finite in {dtype}; take the weights of an earlier step"
        )
    return cast
