"""From a data config to the tokens to train on and to validate with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sophia_levanter.data.config import DataConfig
from sophia_levanter.data.mixture import Mixture
from sophia_levanter.data.names import NANOGPT, STORE, absolute_source
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.data.preparation import Preparation, Report, cache_directory
from sophia_levanter.data.token_store import SIDES, Tokens, TokenStore
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer
from sophia_levanter.errors import InputError

# Makes what is not there yet: one corpus, or its two sides.
Make = Callable[[], Sequence[Tokens]]


@dataclass(frozen=True)
class TextData:
    """The tokens to train on and to validate with."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens


def prepare(config: DataConfig, report: Report, *, ray: str | None = None) -> TextData:
    """The tokens of `config`; text that has no token store in `config.cache_dir` yet gets one.

    Memory is bounded by the largest documents.

    Args:
        config: the text, its tokenizer and the split.
        report: takes a line of news for the user.
        ray: address of a Ray cluster whose cores make the tokens; this machine's if not given.

    Raises:
        InputError: if the tokenizer, a source or the cache is not usable.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.validation is None:
        train, validation = _two_sides(config, tokenizer, report, ray)()
        return TextData(tokenizer, train, validation)
    # All are looked up before the first is read: a misspelt validation path must not wait for the training text.
    names = [config.train] if isinstance(config.train, str) else [part.source for part in config.train]
    makes = [_looked_up("data.train", name, config, tokenizer, report, ray) for name in names]
    make_validation = _looked_up("data.validation", config.validation, config, tokenizer, report, ray)
    corpora = [make()[0] for make in makes]
    (validation,) = make_validation()
    if isinstance(config.train, str):
        return TextData(tokenizer, corpora[0], validation)
    return TextData(tokenizer, Mixture(corpora, [part.weight for part in config.train]), validation)


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
        return _two_sides(config, tokenizer, report, None)()[1]
    return _looked_up("data.validation", config.validation, config, tokenizer, report, None)()[0]


def _two_sides(config: DataConfig, tokenizer: Tokenizer, report: Report, ray: str | None) -> Make:
    assert isinstance(config.train, str)
    return _looked_up("data.train", config.train, config, tokenizer, report, ray, held_out=config.validation_fraction)


def _looked_up(
    field: str,
    name: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    report: Report,
    ray: str | None,
    *,
    held_out: float | None = None,
) -> Make:
    if name.startswith(NANOGPT):
        if held_out is not None:
            raise InputError(
                f"{field} {name}: a part cannot be held out of tokens; set data.validation to {NANOGPT}val.bin"
            )
        corpus = NanogptTokens(name, tokenizer, field=field, cache_dir=cache_directory(config))

        def checked() -> list[Tokens]:
            corpus.check(report)
            return [corpus]

        return checked
    if name.startswith(STORE):
        location = absolute_source(name).removeprefix(STORE).rstrip("/")
        stores = _stores(field, location, tokenizer, both=held_out is not None)
        return lambda: stores
    preparation = Preparation.of(field, name, config, tokenizer, report, held_out=held_out, ray=ray)
    return partial(preparation.stores, report)


def _stores(field: str, location: str, tokenizer: Tokenizer, *, both: bool) -> list[TokenStore]:
    try:
        if both:
            return [TokenStore.open(f"{location}/{side}", tokenizer) for side in SIDES]
        return [TokenStore.open(location, tokenizer)]
    except InputError as error:
        hint = f"; without data.validation, {STORE}FOLDER holds {' and '.join(SIDES)}" if both else ""
        raise InputError(f"{field}: {error}{hint}") from error
