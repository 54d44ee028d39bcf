"""The file of a run's own tokenizer, which is kept beside its checkpoints: whoever has these needs no other."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from pathlib import Path

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.bpe import bpe_file
from sophia_levanter.data.huggingface_tokenizer import ranks_of
from sophia_levanter.data.names import TRAINED_TOKENIZER
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import write_atomically
from sophia_levanter.interop.saved_weights import TOKENIZER_FILE
from sophia_levanter.kvstore import read_file, write_file


def keep_tokenizer(checkpoints: Path | str, tokenizer: Tokenizer, *, is_saved: bool) -> None:
    """Put a tokenizer that is a file beside the checkpoints. Those with a name need no copy.

    Args:
        checkpoints: a path or a URL.
        tokenizer: the run's.
        is_saved: whether there are checkpoints, whose copy stays; without them one is left from an earlier attempt.

    Raises:
        InputError: if it cannot be written.
    """
    if not tokenizer.name.endswith(TRAINED_TOKENIZER):
        return
    try:
        if not is_saved or read_file(checkpoints, TOKENIZER_FILE) is None:
            write_file(checkpoints, TOKENIZER_FILE, bpe_file(ranks_of(tokenizer)))
    except Exception as error:  # whatever a bucket's client makes of a server's answer
        raise _unusable(checkpoints, error) from error


def with_kept_tokenizer(data: DataConfig, checkpoints: Path | str, *, going_on: bool) -> DataConfig:
    """The configuration with the copy in place of the tokenizer's file, where there is one.

    Args:
        data: names the file, which may be gone.
        checkpoints: a path or a URL; from a bucket the copy comes into a temporary folder.
        going_on: whether it is to train: then the original must not have changed.

    Raises:
        InputError: if the original has changed, or the copy cannot be read.
    """
    if not data.tokenizer.endswith(TRAINED_TOKENIZER):
        return data
    try:
        content = read_file(checkpoints, TOKENIZER_FILE)
    except Exception as error:  # whatever a bucket's client makes of a server's answer
        raise _unusable(checkpoints, error) from error
    if content is None:
        return data
    copy = Path(checkpoints, TOKENIZER_FILE)
    if "://" in str(checkpoints):
        copy = Path(_temporary_folder().name, TOKENIZER_FILE)
        write_atomically(copy, content)
    if going_on and os.path.exists(data.tokenizer):
        then, now = (load_tokenizer(str(file)).fingerprint for file in (copy, data.tokenizer))
        if then != now:
            raise InputError(
                f"data.tokenizer {data.tokenizer} is not the one that the run began with, which is kept in "
                f"{checkpoints}/{TOKENIZER_FILE}; restore the original file, or move this one away to use the copy"
            )
    return dataclasses.replace(data, tokenizer=str(copy))


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Goes with this process."""
    return tempfile.TemporaryDirectory(prefix="sophia_levanter-")


def _unusable(checkpoints: Path | str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"data.tokenizer: {checkpoints}/{TOKENIZER_FILE} cannot be used: {reason}; check its folder")
