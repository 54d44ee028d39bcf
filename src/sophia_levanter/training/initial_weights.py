"""The weights that `trainer.initial_weights` names."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from sophia_levanter.config import TrainConfig
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.interop.architectures import WeightsError
from sophia_levanter.interop.pretrained import check_vocabulary, read_pretrained
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.processes import check_agreement
from sophia_levanter.tracking.console import Console


def read_initial_weights(config: TrainConfig, console: Console) -> LanguageModel | None:
    """The weights that a run starts from, in this host's memory; None if they are drawn.

    Raises:
        InputError: if they cannot be read, are of another model, or are not the same in all processes.
    """
    path = config.trainer.initial_weights
    if path is None:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    try:
        weights = read_pretrained(
            path,
            config.model,
            tokenizer=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            dtype=config.trainer.parameter_dtype,
            report=console.line,
        )
        check_vocabulary(path, tokenizer)
    except WeightsError as error:
        raise InputError(f"trainer.initial_weights {error}") from None
    console.line(f"initial weights: {path}")
    if jax.process_count() > 1:
        check_agreement("trainer.initial_weights", _digest(weights))
    return weights


def _digest(weights: LanguageModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
