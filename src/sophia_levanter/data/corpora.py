"""Prepare training and validation tokens, and detect documents that occur in both."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sophia_levanter.config.data import DataConfig, validation_field
from sophia_levanter.data.batches import Mixture, Part, parts_of
from sophia_levanter.data.preparation import Job, Preparation
from sophia_levanter.data.sources import FoundSource, source_named
from sophia_levanter.data.text_files import Report
from sophia_levanter.data.token_store import READ_TOKENS, Tokens, remembered
from sophia_levanter.data.tokenizer import Tokenizer, load_tokenizer, printable, token_byte_lengths
from sophia_levanter.errors import InputError, counted

SHOWN_TOKENS = 16
# Constants for finding documents that are in both the training and the validation text:
MIN_BYTES = 10  # shorter documents may match by chance, so they count only if all documents match
REMEMBERED_TOKENS = 1 << 24  # results for smaller corpora are not cached
DIGEST_BYTES = 8
LEAK_VERSION = 1  # version of the comparison; cached results from other versions are ignored


@dataclass(frozen=True)
class TextData:
    """The training and validation tokens.

    Attributes:
        tokenizer: the tokenizer that produced all of the tokens.
        train: the training tokens.
        validation_sets: the tokens of each validation set, keyed by name. A single unnamed set has an empty name.
        document_end: the token after which attention and positions restart; None to disable document masking.
    """

    tokenizer: Tokenizer
    train: Tokens
    validation_sets: Mapping[str, Tokens]
    document_end: int | None = None

    @property
    def validation(self) -> Tokens:
        """The first validation set."""
        return next(iter(self.validation_sets.values()))

    @property
    def validation_facts(self) -> dict[str, Any]:
        """`Tokens.facts` of the validation set. For named sets, `sets` lists the name and facts of each set."""
        if "" in self.validation_sets:
            return self.validation.facts
        sets = [{"name": name, **tokens.facts} for name, tokens in sorted(self.validation_sets.items())]
        return {"tokenizer": self.tokenizer.fingerprint, "sets": sets}


def prepare(config: DataConfig, report: Report, *, ray: str | None = None, warn: Report | None = None) -> TextData:
    """Find the tokens for `config`, creating any token stores that are missing from `config.cache_dir`.

    Memory use depends on the size of the largest documents, not on the total size of the text.

    Args:
        config: specifies the text, the tokenizer and the validation split.
        report: called with each message for the user.
        ray: the address of a Ray cluster on which to tokenize; by default, tokenization runs on this machine.
        warn: called with each warning; defaults to `report`.

    Raises:
        InputError: if the tokenizer, a source or the cache cannot be used; if training and validation text have
            documents in common and `config.on_leak` is `error`; or if `config.mask_documents` is set but a corpus has
            no end-of-text token.
    """
    _check_separator(config, report)
    tokenizer = load_tokenizer(config.tokenizer)
    job = Job(config, tokenizer, report, warn or report, ray)
    if config.validation is None:
        found = _two_sides(job)
        train, held_out = found.make()
        data = _text_data(config, tokenizer, train, {"": held_out})
        if found.source is None:  # existing stores may overlap; a new split puts identical documents on one side
            _report_leaks(job, data, [found], {"": found})
        return data
    # Find all sources before reading any, so that a misspelled validation path is reported immediately.
    parts = [_find(job, "data.train", part.source) for part in config.train_parts]
    _report_repeats(parts, job.warn)
    sets = _find_validation(job)
    corpora = [part.make()[0] for part in parts]
    weights = [part.weight for part in config.train_parts]
    train = corpora[0] if isinstance(config.train, str) else Mixture(corpora, weights)
    data = _text_data(config, tokenizer, train, {name: found.make()[0] for name, found in sets.items()})
    _report_leaks(job, data, parts, sets)
    return data


def _text_data(config: DataConfig, tokenizer: Tokenizer, train: Tokens, sets: Mapping[str, Tokens]) -> TextData:
    end = masked_end(config, tokenizer, "data.train", train)
    for name, tokens in sets.items():
        masked_end(config, tokenizer, validation_field(name), tokens)
    return TextData(tokenizer, train, sets, end)


def masked_end(config: DataConfig, tokenizer: Tokenizer, field: str, corpus: Tokens) -> int | None:
    """Return the token after which attention and positions restart, or None if `data.mask_documents` is not set.

    Each part of the corpus is read up to its first end-of-text token.

    Raises:
        InputError: if `data.mask_documents` is set, but the corpus or a part of the mixture has no end-of-text token.
    """
    if not config.mask_documents:
        return None
    parts = parts_of(corpus)
    for number, part in enumerate(parts):
        last = part.first + part.num_tokens
        pieces = (corpus.read(i, min(i + READ_TOKENS, last)) for i in range(part.first, last, READ_TOKENS))
        if not any(np.any(piece == tokenizer.end_of_text) for piece in pieces):
            where = field if len(parts) == 1 else f"part {number} of {field}"
            raise InputError(
                f"data.mask_documents is true, but {where} has no end-of-text token (id {tokenizer.end_of_text} in "
                f"{tokenizer.name}) between documents; add one after each document, or set data.mask_documents to false"
            )
    return tokenizer.end_of_text


def _report_repeats(parts: Sequence[FoundSource], warn: Report) -> None:
    """Warn about files that occur in several parts of a mixture."""
    first: dict[str, FoundSource] = {}
    again = [
        (file, first[file], part) for part in parts for file in part.inputs if first.setdefault(file, part) is not part
    ]
    if again:
        file, one, other = again[0]
        warn(
            f"WARNING: data.train: parts of the mixture share {counted(len(again), 'file')}, such as {file} in "
            f"{one.name} and {other.name}; shared text is sampled with the weights of both parts"
        )


def _report_leaks(job: Job, data: TextData, train: Sequence[FoundSource], sets: Mapping[str, FoundSource]) -> None:
    """Warn about documents in the validation sets that also occur in the training text.

    Raises:
        InputError: if any such document is found and `data.on_leak` is `error`.
    """
    for name, tokens in data.validation_sets.items():
        field, found = validation_field(name), sets[name]
        report = partial(_report_of, job.report, field)
        leak = find_leak(data.train, tokens, data.tokenizer, job.cache_dir, report)
        if not leak.count:
            continue
        begin = tokens.read(leak.tokens[0], min(leak.tokens[1], leak.tokens[0] + SHOWN_TOKENS))
        message = (
            f"{field}: {leak.count:,} of its {leak.num_documents:,} documents are also in data.train; the first is "
            f"{_where(found, leak.document)} (document {leak.twin + 1:,} of {train[leak.part].name}), which begins "
            f"with {printable(data.tokenizer.decode(begin))!r}; remove them from one of the two sets"
        )
        if job.config.on_leak == "error":
            raise InputError(f"{message}, or set data.on_leak to warn")
        job.warn(f"WARNING: {message}")


def _report_of(report: Report, field: str, line: str) -> None:
    report(f"{field}: {line}")


def _where(found: FoundSource, number: int) -> str:
    """Describe the location of document `number` (0-based), naming its file if the source can be read again."""
    if found.source is not None:
        with contextlib.suppress(InputError, OSError):
            for position, _ in islice(found.source.documents(), number, None):
                return found.source.where(position)
    return f"document {number + 1:,} of {found.name}"


def prepare_validation(config: DataConfig, tokenizer: Tokenizer, report: Report) -> dict[str, Tokens]:
    """Prepare only the validation sets. The training text is read only if part of it is held out for validation.

    Raises:
        InputError: if a source or the cache cannot be used.
    """
    job = Job(config, tokenizer, report, report)
    if config.validation is None:
        return {"": _two_sides(job).make()[1]}
    return {name: found.make()[0] for name, found in _find_validation(job).items()}


def _check_separator(config: DataConfig, report: Report) -> None:
    """Warn about sources that `data.document_separator` cannot split. Raise an error if it cannot split any source."""
    if config.document_separator is None:
        return
    sources = [source_named(part.source, "data.train") for part in config.train_parts]
    sources += [source_named(source, validation_field(name)) for name, source in config.validation_sets.items()]
    if all(source.holds == "tokens" for source in sources):
        raise InputError(
            f"data.document_separator is {config.document_separator!r}, but every source is a token file, which "
            "contains no text; remove the setting"
        )
    for source in sources:
        if source.holds != "text":
            report(f"data.document_separator does not apply to {source.name}, which contains tokens")


def _find(job: Job, field: str, name: str, held_out: float | None = None) -> FoundSource:
    """Find the tokens of a source without reading any text. The result has two corpora if `held_out` is given."""
    source = source_named(name, field)
    if found := source.find_tokens(job.tokenizer, job.cache_dir, job.report, both=held_out is not None):
        return found
    preparation = Preparation(source, job, held_out)
    return FoundSource(name, preparation.source.inputs, preparation.stores, preparation.source)


def _find_validation(job: Job) -> dict[str, FoundSource]:
    return {name: _find(job, validation_field(name), source) for name, source in job.config.validation_sets.items()}


def _two_sides(job: Job) -> FoundSource:
    """Find the tokens of the training text, split into a training and a held-out part."""
    assert isinstance(job.config.train, str)
    return _find(job, "data.train", job.config.train, job.config.validation_fraction)


@dataclass(frozen=True)
class Leak:
    """Documents that occur in both a validation corpus and the training corpus."""

    count: int  # if 0, only `num_documents` is used
    num_documents: int  # in the validation corpus
    document: int = 0  # the index of the first such document in the validation corpus
    tokens: tuple[int, int] = (0, 0)  # the range of its tokens in the validation corpus, (start, stop)
    part: int = 0  # the index of the part of the training mixture that contains the document
    twin: int = 0  # the index of the document in that part


def find_leak(train: Tokens, validation: Tokens, tokenizer: Tokenizer, cache_dir: Path, report: Report) -> Leak:
    """Find validation documents that also occur in the training corpus, token for token.

    End-of-text tokens separate documents. Documents shorter than `MIN_BYTES` bytes count only if all validation
    documents also occur in the training corpus. Memory use grows with the number of validation documents, but not with
    the number of training documents. Large comparisons are reported, and their results are cached in `cache_dir`.
    """
    num_tokens = train.num_tokens + validation.num_tokens
    is_large = num_tokens >= REMEMBERED_TOKENS

    def compare() -> dict[str, Any]:
        if is_large:
            report(f"checking {num_tokens:,} tokens for documents that are also in data.train")
        return _compare(train, validation, tokenizer)

    key = ["leak", LEAK_VERSION, train.facts, validation.facts]
    found = remembered(cache_dir if is_large else None, key, compare)
    return Leak(**found)


def _compare(train: Tokens, validation: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
    blocks = [block for part in parts_of(validation) for block in _documents(validation, part, tokenizer)]
    digests, begins, ends = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    if not len(digests):
        return {"count": 0, "num_documents": 0}
    wanted, place = np.unique(digests, return_inverse=True)
    parts, twins = np.full(len(wanted), -1), np.full(len(wanted), -1)
    for number, part in enumerate(parts_of(train)):
        count = 0
        for found, _, _ in _documents(train, part, tokenizer):
            at = np.searchsorted(wanted, found)
            at[at == len(wanted)] = 0
            # Use reverse order, so that the first of several identical documents is written last and therefore kept.
            new = np.flatnonzero((wanted[at] == found) & (parts[at] < 0))[::-1]
            parts[at[new]], twins[at[new]] = number, count + new
            count += len(found)
    leaked = parts[place] >= 0
    if not leaked.all():
        sizes = token_byte_lengths(tokenizer)
        for i in np.flatnonzero(leaked & (ends - begins < MIN_BYTES)).tolist():
            leaked[i] = sizes[validation.read(begins[i], ends[i])].sum() >= MIN_BYTES
    first = int(np.argmax(leaked))
    return {
        "count": int(leaked.sum()),
        "num_documents": len(leaked),
        "document": first,
        "tokens": [int(begins[first]), int(ends[first])],
        "part": int(parts[place[first]]),
        "twin": int(twins[place[first]]),
    }


def _documents(corpus: Tokens, part: Part, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the digests, starts and ends of all non-empty documents, block by block."""
    dtype = tokenizer.dtype.newbyteorder("<")
    last = part.first + part.num_tokens
    new_digest = partial(hashlib.blake2b, digest_size=DIGEST_BYTES)
    begin, digest = part.first, new_digest()
    for start in range(part.first, last, READ_TOKENS):
        stop = min(start + READ_TOKENS, last)
        tokens = corpus.read(start, stop).astype(dtype)
        text = tokens.view(np.uint8).data
        ends = (start + np.flatnonzero(tokens == tokenizer.end_of_text)).tolist()
        if stop == last:
            ends.append(last)
        found, read = [], start
        for end in ends:
            digest.update(text[(read - start) * dtype.itemsize : (end - start) * dtype.itemsize])
            if end > begin:
                found.append((int.from_bytes(digest.digest(), "little"), begin, end))
            begin = read = end + 1
            digest = new_digest()
        digest.update(text[max(read - start, 0) * dtype.itemsize :])
        columns = zip(*found, strict=True) if found else ([], [], [])
        yield tuple(
            np.array(column, kind) for column, kind in zip(columns, (np.uint64, np.int64, np.int64), strict=True)
        )
