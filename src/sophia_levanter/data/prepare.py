"""From a data config to the tokens to train on and to validate with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.leaks import find_leak
from sophia_levanter.data.mixture import Mixture
from sophia_levanter.data.preparation import Preparation, cache_directory
from sophia_levanter.data.sources import Corpora, Report, source_named
from sophia_levanter.data.token_store import Tokens
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer, printable
from sophia_levanter.errors import InputError

SHOWN_TOKENS = 16


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
    lookup = _Lookup(config, tokenizer, report, warn, ray)
    if config.validation is None:
        found = lookup.two_sides()
        train, validation = found.make()
        data = TextData(tokenizer, train, validation)
        if found.source is None:  # two stores may be of any texts, but a split has equal texts on one side
            _report_leak(data, config, [found.name], found, report, warn)
        return data
    # All are looked up before the first is read: a misspelt validation path must not wait for the training text.
    names = [part.source for part in config.train_parts]
    parts = [lookup.find("data.train", name) for name in names]
    _report_repeats(parts, warn)
    found = lookup.find("data.validation", config.validation)
    corpora = [part.make()[0] for part in parts]
    (validation,) = found.make()
    if isinstance(config.train, str):
        data = TextData(tokenizer, corpora[0], validation)
    else:
        data = TextData(tokenizer, Mixture(corpora, [part.weight for part in config.train]), validation)
    _report_leak(data, config, names, found, report, warn)
    return data


def _report_repeats(parts: Sequence[Corpora], warn: Report) -> None:
    """Say which files are in several parts of a mixture."""
    first: dict[str, Corpora] = {}
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
    data: TextData, config: DataConfig, train: Sequence[str], validation: Corpora, report: Report, warn: Report
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


def _where(found: Corpora, number: int) -> str:
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
    lookup = _Lookup(config, tokenizer, report, report)
    if config.validation is None:
        return lookup.two_sides().make()[1]
    return lookup.find("data.validation", config.validation).make()[0]


def _check_separator(config: DataConfig, report: Report) -> None:
    """Warn about sources that `data.document_separator` cannot split; refuse it if it can split none of them."""
    if config.document_separator is None:
        return
    sources = [source_named(part.source, "data.train") for part in config.train_parts]
    sources += [source_named(config.validation, "data.validation")] if config.validation is not None else []
    if all(source.holds == "tokens" for source in sources):
        raise InputError(
            f"data.document_separator is {config.document_separator!r}, and every source is a token file, which holds "
            "no text; leave it out"
        )
    for source in sources:
        if source.holds != "text":
            report(f"data.document_separator does not apply to {source.name}, which holds tokens")


@dataclass(frozen=True)
class _Lookup:
    """Looks up sources; nothing of their text is read yet. Attributes as the arguments of `prepare`."""

    config: DataConfig
    tokenizer: Tokenizer
    report: Report
    warn: Report
    ray: str | None = None

    def find(self, field: str, name: str, held_out: float | None = None) -> Corpora:
        """The tokens of the source of this name, which the field has; two corpora if a share is held out."""
        config, tokenizer, report = self.config, self.tokenizer, self.report
        source = source_named(name, field)
        if found := source.find_tokens(tokenizer, cache_directory(config), report, both=held_out is not None):
            return found
        preparation = Preparation.of(source, config, tokenizer, report, held_out=held_out, ray=self.ray)
        make = partial(preparation.stores, report, self.warn)
        return Corpora(name, preparation.source.inputs, make, preparation.source)

    def two_sides(self) -> Corpora:
        """The tokens of the training text, split into a training and a held-out part."""
        assert isinstance(self.config.train, str)
        return self.find("data.train", self.config.train, self.config.validation_fraction)
