"""From a data config to the tokens to train on and to validate with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.leaks import find_leak
from sophia_levanter.data.mixture import Mixture
from sophia_levanter.data.names import NANOGPT, STORE, absolute_source
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.data.preparation import Preparation, Report, cache_directory
from sophia_levanter.data.sources import Source
from sophia_levanter.data.token_store import SIDES, Tokens, TokenStore
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer, printable
from sophia_levanter.errors import InputError

SHOWN_TOKENS = 16


@dataclass(frozen=True)
class _Found:
    """Tokens that were looked up.

    Attributes:
        name: what the user wrote.
        inputs: what is read, by names that are the same for the same file.
        make: makes what is not there yet: one corpus, or its two sides.
        source: the documents; None where only their tokens are there.
    """

    name: str
    inputs: Sequence[str]
    make: Callable[[], Sequence[Tokens]]
    source: Source | None = None


@dataclass(frozen=True)
class TextData:
    """The tokens to train on and to validate with."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens


def prepare(config: DataConfig, report: Report, *, ray: str | None = None, warn: Report | None = None) -> TextData:
    """The tokens of `config`; text that has no token store in `config.cache_dir` yet gets one.

    Memory is bounded by the largest documents.

    Args:
        config: the text, its tokenizer and the split.
        report: takes a line of news for the user.
        ray: address of a Ray cluster whose cores make the tokens; this machine's if not given.
        warn: takes a warning; `report` if not given.

    Raises:
        InputError: if the tokenizer, a source or the cache is not usable, or training and validation text have
            documents in common and `config.on_leak` is `error`.
    """
    warn = warn or report
    _check_separator(config, report)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.validation is None:
        found = _two_sides(config, tokenizer, report, ray, warn)
        train, validation = found.make()
        data = TextData(tokenizer, train, validation)
        if found.source is None:  # two stores may be of any texts, but a split has equal texts on one side
            _report_leak(data, config, [found.name], found, report, warn)
        return data
    # All are looked up before the first is read: a misspelt validation path must not wait for the training text.
    names = [config.train] if isinstance(config.train, str) else [part.source for part in config.train]
    parts = [_looked_up("data.train", name, config, tokenizer, report, ray, warn) for name in names]
    _report_repeats(parts, warn)
    found = _looked_up("data.validation", config.validation, config, tokenizer, report, ray, warn)
    corpora = [part.make()[0] for part in parts]
    (validation,) = found.make()
    if isinstance(config.train, str):
        data = TextData(tokenizer, corpora[0], validation)
    else:
        data = TextData(tokenizer, Mixture(corpora, [part.weight for part in config.train]), validation)
    _report_leak(data, config, names, found, report, warn)
    return data


def _report_repeats(parts: Sequence[_Found], warn: Report) -> None:
    """Say which files are in several parts of a mixture."""
    first: dict[str, _Found] = {}
    again = [
        (file, first[file], part) for part in parts for file in part.inputs if first.setdefault(file, part) is not part
    ]
    if again:
        file, one, other = again[0]
        warn(
            f"WARNING: data.train: {len(again)} of the files are in two parts of the mixture, such as {file} in "
            f"{one.name} and in {other.name}; their text has the weights of both"
        )


def _report_leak(
    data: TextData, config: DataConfig, train: Sequence[str], validation: _Found, report: Report, warn: Report
) -> None:
    """Say which documents are both trained on and validated with.

    Raises:
        InputError: if there are some and `data.on_leak` is `error`.
    """
    leak = find_leak(data.train, data.validation, data.tokenizer, cache_directory(config), report)
    if not leak.count:
        return
    begin = data.validation.read(leak.tokens[0], min(leak.tokens[1], leak.tokens[0] + SHOWN_TOKENS))
    message = (
        f"data.validation: {leak.count:,} of its {leak.num_documents:,} documents are also in data.train; the first is "
        f"{_where(validation, leak.document)} (document {leak.twin + 1:,} of {train[leak.part]}), which begins "
        f"{printable(data.tokenizer.decode(begin))!r}; remove them from one of the two"
    )
    if config.on_leak == "error":
        raise InputError(f"{message}, or set data.on_leak to warn")
    warn(f"WARNING: {message}")


def _where(found: _Found, number: int) -> str:
    """The document of a number, from 0: by its file where that can be read again."""
    if found.source is not None:
        with contextlib.suppress(InputError, OSError):
            for position, _ in islice(found.source.documents(), number, None):
                return found.source.where(position)
    return f"document {number + 1:,} of {found.name}"


def prepare_validation(config: DataConfig, tokenizer: Tokenizer, report: Report) -> Tokens:
    """The tokens to validate with; of a training text, only one that a part is held out of is looked at.

    Args:
        config: as for `prepare`.
        tokenizer: the one that `config` names.
        report: takes a line of news for the user.

    Raises:
        InputError: if a source or the cache is not usable.
    """
    if config.validation is None:
        return _two_sides(config, tokenizer, report, None, report).make()[1]
    return _looked_up("data.validation", config.validation, config, tokenizer, report, None, report).make()[0]


def _check_separator(config: DataConfig, report: Report) -> None:
    """Warn about sources that `data.document_separator` cannot split; refuse it if it can split none of them."""
    names = [config.train] if isinstance(config.train, str) else [part.source for part in config.train]
    names += [config.validation] if config.validation is not None else []
    if config.document_separator is None:
        return
    if all(name.startswith(NANOGPT) for name in names):
        raise InputError(
            f"data.document_separator is {config.document_separator!r}, and every source is a token file, which holds "
            "no text; leave it out"
        )
    for name in names:
        if name.startswith((NANOGPT, STORE)):
            report(f"data.document_separator does not apply to {name}, which holds tokens")


def _two_sides(config: DataConfig, tokenizer: Tokenizer, report: Report, ray: str | None, warn: Report) -> _Found:
    assert isinstance(config.train, str)
    held_out = config.validation_fraction
    return _looked_up("data.train", config.train, config, tokenizer, report, ray, warn, held_out=held_out)


def _looked_up(
    field: str,
    name: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    report: Report,
    ray: str | None,
    warn: Report,
    *,
    held_out: float | None = None,
) -> _Found:
    if name.startswith(NANOGPT):
        if held_out is not None:
            raise InputError(
                f"{field} {name}: a part cannot be held out of tokens; set data.validation to {NANOGPT}val.bin"
            )
        corpus = NanogptTokens(name, tokenizer, field=field, cache_dir=cache_directory(config))

        def checked() -> list[Tokens]:
            corpus.check(report)
            return [corpus]

        return _Found(name, [os.path.realpath(corpus.path)], checked)
    if name.startswith(STORE):
        location = absolute_source(name).removeprefix(STORE).rstrip("/")
        stores = _stores(field, location, tokenizer, both=held_out is not None)
        return _Found(name, [location], lambda: stores)
    preparation = Preparation.of(field, name, config, tokenizer, report, held_out=held_out, ray=ray)
    return _Found(name, preparation.source.inputs, partial(preparation.stores, report, warn), preparation.source)


def _stores(field: str, location: str, tokenizer: Tokenizer, *, both: bool) -> list[TokenStore]:
    try:
        if both:
            return [TokenStore.open(f"{location}/{side}", tokenizer) for side in SIDES]
        return [TokenStore.open(location, tokenizer)]
    except InputError as error:
        hint = f"; without data.validation, {STORE}FOLDER holds {' and '.join(SIDES)}" if both else ""
        raise InputError(f"{field}: {error}{hint}") from error
