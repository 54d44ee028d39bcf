"""Exporting a trained model to a folder that transformers can read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

import sophia_levanter
from sophia_levanter.data.bpe import ranks_of, save_bpe, tokenizer_config_json, tokenizer_json
from sophia_levanter.data.tokenizer import TRAINED_TOKENIZER
from sophia_levanter.errors import InputError
from sophia_levanter.files import sync, write_atomically
from sophia_levanter.interop.architectures import architecture_of
from sophia_levanter.interop.saved_weights import OWN_FIELD, TOKENIZER_FILE
from sophia_levanter.interop.state_dict import to_state_dict

if TYPE_CHECKING:
    from sophia_levanter.run.loading import LoadedModel


def export_model(loaded: LoadedModel, folder: Path, dtype: str | None = None) -> None:
    """Export a model, its tokenizer and this package's settings in the `save_pretrained` format of transformers.

    With `model.parametrization: mup`, the mup factors are folded into the weights, so the exported model is standard.

    Args:
        loaded: the model.
        folder: the target folder, which appears only once it is complete.
        dtype: the dtype of the weights, `float32`, `bfloat16` or `float16`; unchanged by default.

    Raises:
        InputError: if the folder contains files or cannot be created, or the dtype cannot represent the weights.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    architecture = architecture_of(model.config)
    has_own_file = tokenizer.name.endswith(TRAINED_TOKENIZER)
    arrays = architecture.complete(_cast(architecture.fold_factors(model.config, to_state_dict(model)), dtype))
    own = {
        "version": sophia_levanter.__version__,
        "step": loaded.step,
        "tokenizer": TOKENIZER_FILE if has_own_file else tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **({"use_bias": getattr(model.config, "use_bias", True)} if architecture.always_has_biases else {}),
    }
    end_of_text = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    shape = architecture.describe(model.config) | {
        "torch_dtype": arrays[architecture.prefix + architecture.embedding].dtype.name,  # transformers 5 reads it too
        "vocab_size": model.config.embedding_rows(model.vocab_size),
    }
    documents: dict[str, dict[str, Any]] = {
        "config.json": {**shape, **end_of_text, OWN_FIELD: own},
        "generation_config.json": {**end_of_text, "pad_token_id": tokenizer.end_of_text},
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config_json(model.config.seq_len),
    }
    with _whole(folder) as partial:
        for name, values in documents.items():
            write_atomically(partial / name, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
        if has_own_file:
            save_bpe(partial / TOKENIZER_FILE, ranks_of(tokenizer))
        _save(partial / "model.safetensors", arrays)
        # safetensors creates a file that only its owner can read.
        shutil.copymode(partial / "config.json", partial / "model.safetensors")


def check_new_folder(folder: Path) -> None:
    """Check that an export would not overwrite files.

    Raises:
        InputError: if the path exists and is not an empty folder.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} already contains files; specify an empty or new folder")
    if not folder.is_dir() and os.path.lexists(folder):
        raise InputError(f"{folder} is a file; specify an empty or new folder")


def _cast(arrays: Mapping[str, np.ndarray], dtype: str | None) -> dict[str, np.ndarray]:
    cast = {}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} contains non-finite values; export an earlier step with --step")
        with np.errstate(over="ignore"):
            cast[name] = array if dtype is None else array.astype(jnp.dtype(dtype))
        if not np.isfinite(cast[name]).all():
            raise InputError(f"--dtype {dtype} cannot represent {name}; use --dtype float32")
    return cast


def _save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    sync(file)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` at the end or removed after an error."""
    check_new_folder(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error.strerror}; choose another folder") from error
    try:
        yield partial
        sync(partial)
        partial.replace(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
