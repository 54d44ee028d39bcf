"""`python -m sophia_levanter.commands.train_tokenizer --config FILE ...`: train a byte-pair encoding on text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sophia_levanter.config.arguments import parse_arguments, whole_number
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.sources import TRAINED_TOKENIZER
from sophia_levanter.errors import InputError
from sophia_levanter.run.directory import with_absolute_paths
from sophia_levanter.status import DONE, run_command

TRAIN_BYTES = 1 << 30
USAGE = f"""\
usage: python -m sophia_levanter.commands.train_tokenizer --config FILE --vocab_size N --out FILE{TRAINED_TOKENIZER}
       [--data.FIELD VALUE ...] [--help]

Train a byte-pair encoding on at most the first GiB of a configuration's training text, excluding held-out documents.
Use it with --data.tokenizer FILE{TRAINED_TOKENIZER}.

  --config FILE          a run's configuration, or only its data section
  --vocab_size N         number of tokens, including the 256 bytes and the end-of-text token
  --out FILE             file to write; its name must end in {TRAINED_TOKENIZER}
  --data.FIELD VALUE     override a field in the file: --data.train 'texts/*.jsonl.zst'
  --help                 show this help message and exit"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure, 2 on bad input, or 130 on Ctrl-C."""
    return run_command(argv, _train, usage=USAGE)


def _train(words: Sequence[str]) -> int:
    arguments = parse_arguments(words, options=("--config", "--vocab_size", "--out"), overrides=True)
    path = Path(arguments.needed("--config", "FILE", "for example, --config config/data/openwebtext.yaml"))
    size = whole_number("--vocab_size", arguments.needed("--vocab_size", "N", "GPT-2 uses 50257"))
    out = Path(arguments.needed("--out", "FILE", f"for example, --out my{TRAINED_TOKENIZER}"))
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; specify a file")
    if out.suffix != TRAINED_TOKENIZER:
        raise InputError(f"--out {out} must end in {TRAINED_TOKENIZER}")
    config = with_absolute_paths(load_config(path, arguments.overrides))

    # Import slow modules after the checks, so that mistakes are reported immediately.
    from sophia_levanter.data.bpe import first_bytes, save_bpe, train_bpe
    from sophia_levanter.data.tokenizer import load_tokenizer

    ranks = train_bpe(first_bytes(_training_texts(config.data), TRAIN_BYTES), size)
    save_bpe(out, ranks)
    print(f"wrote {load_tokenizer(str(out)).vocab_size:,} tokens, including the end-of-text token, to {out}")
    return DONE


def _training_texts(config: DataConfig) -> Iterator[str]:
    found = False
    for text in _all_texts(config):
        found = True
        yield text
    if not found:
        raise InputError(f"data.train: {config.train!r} contains no documents with text")


def _all_texts(config: DataConfig) -> Iterator[str]:
    from sophia_levanter.data.documents import Rows, Split
    from sophia_levanter.data.sources import source_named

    for part in config.train_parts:
        field = "data.train"
        fraction = config.validation_fraction if config.validation is None else 0.0
        split = Split(fraction, field=field, settled=fraction == 0)
        source = source_named(part.source, field).open(Rows(config, field), print)
        for _, text in source.documents():
            yield from (own for held_out, own in split.push(text) if not held_out)
        yield from (own for held_out, own in split.finish() if not held_out)
        if source.rows.left_out:
            print(f"{field}: {source.rows.left_out}")
        for warning in source.rows.warnings():
            print(warning)


if __name__ == "__main__":
    sys.exit(main())
