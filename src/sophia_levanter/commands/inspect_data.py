"""`python -m sophia_levanter.commands.inspect_data STORE`: show the contents of a token store."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sophia_levanter.config.arguments import PLUGINS, parse_arguments, whole_number
from sophia_levanter.config.files import Setting
from sophia_levanter.config.registries import KEY, with_plugins
from sophia_levanter.errors import InputError, one_line
from sophia_levanter.status import DONE, run_command

if TYPE_CHECKING:
    import numpy as np

    from sophia_levanter.data.token_store import TokenStore

SHOWN_CHARACTERS = 300
DOCUMENTS_AT_ONCE = 1 << 20  # the document ends of a large store take up gigabytes
USAGE = """\
usage: python -m sophia_levanter.commands.inspect_data STORE [--documents N] [--seq_len N] [--verify]
       [--plugins MODULE] [--help]

Print a summary of a token store, statistics on how documents fill training sequences, and the start of a few documents.

  STORE                  a folder that prepare_data reported, or a URL such as gs://bucket/folder; if it contains
                         the stores train and validation, both are printed
  --documents N          number of documents to print, spread evenly (default: 3)
  --seq_len N            number of tokens in a training sequence, like model.seq_len (default: 1024)
  --verify               read all data and compare it with the checksums
  --plugins MODULE       import the module that registers the store's tokenizer
  --help                 show this help message and exit"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure, 2 on bad input or a damaged store, or 130 on Ctrl-C."""
    return run_command(argv, _inspect, usage=USAGE)


def _inspect(words: Sequence[str]) -> int:
    arguments = parse_arguments(words, options=("--documents", "--seq_len", PLUGINS), flags=("--verify",), words=True)
    if len(arguments.words) != 1:
        raise InputError(f"expected one STORE, found {len(arguments.words)}; --help shows the options")
    if PLUGINS in arguments.options:
        with_plugins([{KEY: Setting(arguments.options[PLUGINS])}])
    count = whole_number("--documents", arguments.options.get("--documents", "3"))
    seq_len = whole_number("--seq_len", arguments.options.get("--seq_len", "1024"))
    if not seq_len:
        raise InputError("--seq_len is 0; it must be at least 1")
    location = arguments.words[0].rstrip("/")
    if "://" not in location:
        location = os.path.abspath(os.path.expanduser(location))

    from sophia_levanter.data.token_store import SIDES

    folders = [f"{location}/{name}" for name in ("all", *SIDES)]
    for store in [folder for folder in folders if _exists(folder)] or [location]:
        _print_store(store, count, seq_len, verify="--verify" in arguments.flags)
    return DONE


def _exists(folder: str) -> bool:
    """Return whether a local folder, or a token store at a URL, exists."""
    from sophia_levanter.data.token_store import MANIFEST_NAME
    from sophia_levanter.kvstore import read_file

    if "://" not in folder:
        return Path(folder).is_dir()
    try:
        return read_file(folder, MANIFEST_NAME) is not None
    except ValueError:  # for example, the bucket does not respond; opening the store reports it
        return False


def _print_store(location: str, count: int, seq_len: int, *, verify: bool) -> None:
    from sophia_levanter.data.packing import packing_of
    from sophia_levanter.data.token_store import TokenStore
    from sophia_levanter.data.tokenizer import load_tokenizer

    store = TokenStore.open(location)
    manifest = store.manifest
    print(one_line(location))
    print(f"  source      {one_line(manifest.source)}")
    print(f"  tokenizer   {one_line(manifest.tokenizer_name)} ({manifest.tokenizer_fingerprint})")
    print(f"  documents   {manifest.num_documents:,}")
    print(f"  tokens      {manifest.num_tokens:,} ({store.dtype})")
    print(f"  text        {manifest.num_bytes:,} bytes, {manifest.num_bytes / manifest.num_tokens:.2f} per token")
    print(f"  digest      {manifest.digest}")
    packing = packing_of(_ends_in_parts(store), seq_len)
    print(f"  lengths     median document {packing.median_length:,.0f} tokens, longest {packing.longest:,}")
    print(
        f"  packing     {packing.documents_per_sequence:.2f} documents per sequence of {seq_len:,} tokens (--seq_len); "
        f"{packing.share_of_one:.1%} of the sequences contain only one document"
    )
    print(f"  masks       data.mask_documents removes {packing.removed_share:.1%} of the attention pairs")
    if verify:
        store.verify()
        print("  verified    every token and document end matches what was written")
    tokenizer = load_tokenizer(manifest.tokenizer_name)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"{location} was written with tokenizer {manifest.tokenizer_name} (fingerprint "
            f"{manifest.tokenizer_fingerprint}), whose fingerprint is now {tokenizer.fingerprint}; restore its "
            "original file"
        )
    shown = min(count, manifest.num_documents)
    for number in [i * manifest.num_documents // shown for i in range(shown)]:
        tokens = store.document(number)
        text = tokenizer.decode(tokens[:SHOWN_CHARACTERS])[:SHOWN_CHARACTERS]
        print(f"  document {number:,}, {len(tokens):,} tokens: {text!r}")


def _ends_in_parts(store: TokenStore) -> Iterator[np.ndarray]:
    """Yield the `document_ends` of all documents, at most `DOCUMENTS_AT_ONCE` at a time."""
    for first in range(0, store.num_documents, DOCUMENTS_AT_ONCE):
        yield store.document_ends(first, min(first + DOCUMENTS_AT_ONCE, store.num_documents))


if __name__ == "__main__":
    sys.exit(main())
