"""`python -m sophia_levanter.commands.report RUN_DIR... -o report.html`: show training runs on one page."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sophia_levanter.config.arguments import parse_arguments
from sophia_levanter.errors import InputError, counted, one_line
from sophia_levanter.status import DONE, run_command

USAGE = """\
usage: python -m sophia_levanter.commands.report [NAME=]RUN_DIR [[NAME=]RUN_DIR ...] [-o FILE.html] [--help]

Write a self-contained HTML page with the runs' losses, win rates, throughput and configurations, and PNG images of its
curves in the same directory.

  [NAME=]RUN_DIR         a run directory, and a name for the run (default: the directory's name)
  -o, --output FILE      page to write (default: report.html); images are written to FILE-loss.png, ...
  --help                 show this help message and exit"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure, 2 on bad input, or 130 on Ctrl-C."""
    return run_command(argv, _report, usage=USAGE)


def parse(words: Sequence[str]) -> tuple[dict[str, Path], Path]:
    """Parse the command line.

    Returns:
        The run directories, keyed by run name, and the path of the page.

    Raises:
        InputError: if an argument is unknown, a run is given twice, or the output path is not usable.
    """
    arguments = parse_arguments(words, options=("-o", "--output"), words=True)
    if len(arguments.options) > 1:
        raise InputError("-o and --output are the same option; use only one of them")
    page = Path(next(iter(arguments.options.values()), "report.html"))
    if page.suffix != ".html":
        raise InputError(f"--output {page} must end in .html")
    if page.is_dir():
        raise InputError(f"--output {page} is a directory; specify a file")
    if not page.parent.is_dir():
        raise InputError(f"--output {page}: the directory {page.parent} does not exist; create it first")
    if not arguments.words:
        raise InputError("specify at least one run directory: RUN_DIR or NAME=RUN_DIR; --help shows the options")
    return _named(arguments.words), page


def _named(words: Sequence[str]) -> dict[str, Path]:
    runs: dict[str, Path] = {}
    for word in words:
        name, path = _name_and_path(word)
        name = name.encode(errors="replace").decode()  # images cannot show lone surrogates
        for other, known in runs.items():
            if os.path.realpath(path) == os.path.realpath(known):
                raise InputError(f"{word} is given twice" if other == name else f"{word} is the same run as {other}")
        if name in runs:
            raise InputError(
                f"two runs are named {name}: {runs[name]} and {path}; rename one of them with NAME=RUN_DIR"
            )
        runs[name] = path
    return runs


def _name_and_path(word: str) -> tuple[str, Path]:
    before, equals, after = word.partition("=")
    # The name of a directory may itself contain "=", as in runs/lr=0.01.
    if not equals or "/" in before or os.path.isdir(word):
        path = Path(os.path.expanduser(word))
        return Path(os.path.abspath(path)).name or word, path
    if not before.strip() or not after:
        raise InputError(f"{word!r} is missing a name or a directory; use NAME=RUN_DIR")
    return before.strip(), Path(os.path.expanduser(after))


def _report(words: Sequence[str]) -> int:
    named, page = parse(words)
    for path in named.values():
        if not os.path.isdir(path):  # `Path.is_dir` raises OSError for some names
            raise InputError(f"{path} does not exist; specify a run directory")

    # jax reads this variable when it starts. Leave the accelerator to the run, which may still be using it.
    os.environ["JAX_PLATFORMS"] = "cpu"

    from sophia_levanter.studies.comparability import compare
    from sophia_levanter.studies.runs import read_run

    try:
        from sophia_levanter.studies.page import in_lines, write_page
        from sophia_levanter.studies.plots import MOST_STYLES
    except ImportError:
        raise InputError("report requires matplotlib and jinja2; install sophia-levanter[compare]") from None
    if len(named) > MOST_STYLES:
        raise InputError(f"{len(named)} runs are too many to tell their curves apart; specify at most {MOST_STYLES}")
    runs = [read_run(name, path) for name, path in named.items()]
    comparability = compare(runs)
    try:
        files = write_page(runs, comparability, page)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"--output {page} cannot be written: {error.strerror}; choose another location") from error
    print("\n".join(in_lines(runs, comparability)))
    print(one_line(f"wrote {files[0]} and {counted(len(files) - 1, 'image')}: {page.stem}-*.png"))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
