"""`python -m sophia_levanter.commands.checkpoints list|verify|show|diff|prune DIR`: inspect and prune checkpoints."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sophia_levanter.config.arguments import Arguments, chosen, parse_arguments, whole_number
from sophia_levanter.errors import InputError, counted, one_line
from sophia_levanter.status import DONE, FAILURE, run_command

if TYPE_CHECKING:
    from sophia_levanter.run.directory import RunDirectory

USAGE = """\
usage: python -m sophia_levanter.commands.checkpoints list DIR
       python -m sophia_levanter.commands.checkpoints verify DIR [--step N]
       python -m sophia_levanter.commands.checkpoints show DIR [--step N]
       python -m sophia_levanter.commands.checkpoints diff DIR A B
       python -m sophia_levanter.commands.checkpoints prune DIR --keep N [--every K] [--dry_run]

  DIR                    a run directory, or a folder of checkpoints, which may be a gs:// or s3:// URL
  list                   list each step with its age, size and losses
  verify                 read every byte and report damaged files; exit with status 1 if there are any
  show                   show the contents of the newest step, or of step N: names, shapes, norms
  diff                   show how steps A and B differ
  prune                  keep the newest N steps, the best step and, with --every, multiples of K; remove all others
                         and, except in a bucket, files left by interrupted saves; --dry_run removes nothing
  --help                 show this help message and exit"""
OPTIONS: dict[str, tuple[str, ...]] = {
    "list": (),
    "verify": ("--step",),
    "show": ("--step",),
    "diff": (),
    "prune": ("--keep", "--every"),
}
_STEP_FOLDER = re.compile(r"(.*)/step-(\d{8,})")


@dataclass(frozen=True)
class Place:
    """A folder of checkpoints.

    Attributes:
        location: the path or URL of the folder.
        run_dir: the directory of the run that saved the checkpoints; None if it is not known or not on this machine.
    """

    location: str
    run_dir: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure or a corrupt checkpoint, 2 on bad input, or 130 on Ctrl-C."""
    return run_command(argv, _run, usage=USAGE)


def _run(given: Sequence[str]) -> int:
    what, rest = chosen(given, OPTIONS)
    flags = ("--dry_run",) if what == "prune" else ()
    arguments = parse_arguments(rest, options=OPTIONS[what], flags=flags, words=True)
    expected = ["DIR", "A", "B"] if what == "diff" else ["DIR"]
    if len(arguments.words) != len(expected):
        found = counted(len(arguments.words), "argument")
        raise InputError(f"{what}: expected {' '.join(expected)}, found {found}; --help shows the options")
    numbers = {name: whole_number(name, text) for name, text in arguments.options.items()}
    if what == "prune":
        arguments.needed("--keep", "N", "specify how many of the newest steps to keep")
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"{name} is {number}; it must be at least 1")
    place = _place(arguments.words[0].rstrip("/") or "/")

    # Import slow modules after the checks.
    from sophia_levanter.checkpoint import CheckpointError

    try:
        return _do(what, place, arguments, numbers)
    except CheckpointError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return FAILURE


def _place(text: str) -> Place:
    if "://" in text:
        return Place(text, None)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if not path.is_dir():
        raise InputError(f"{text} does not exist; specify a run directory or a folder of checkpoints")
    if (path / "config.yaml").is_file():
        from sophia_levanter.config.command_line import load_config

        elsewhere = load_config(path / "config.yaml").trainer.checkpoint_dir
        return Place(elsewhere or str(path / "checkpoints"), path)
    if (path / "checkpoints").is_dir():
        return Place(str(path / "checkpoints"), path)
    return Place(str(path), path.parent if (path.parent / "config.yaml").is_file() else None)


def _do(what: str, place: Place, arguments: Arguments, numbers: dict[str, int]) -> int:
    from sophia_levanter import checkpoint
    from sophia_levanter.commands import checkpoint_report as report

    if match := _STEP_FOLDER.fullmatch(place.location):
        raise InputError(
            f"{place.location} is the folder of one step; specify its parent, {match[1]}, and the step, "
            f"{int(match[2])}, separately"
        )
    steps = checkpoint.steps(place.location)
    if not steps:
        raise InputError(f"{place.location} contains no checkpoint (no step-* folder)")
    wanted = [whole_number("step", word) for word in arguments.words[1:]]
    wanted += [numbers["--step"]] if "--step" in numbers else []
    for step in wanted:
        if step not in steps:
            raise InputError(
                f"{place.location} has no checkpoint for step {step}; available steps: {', '.join(map(str, steps))}"
            )
    if what == "list":
        lines = report.list_steps(place.location, steps)
    elif what == "show":
        lines = report.describe(place.location, wanted[0] if wanted else steps[-1])
    elif what == "diff":
        lines = report.compare(place.location, *wanted)
    elif what == "verify":
        return _verify(place.location, wanted or steps)
    else:
        return _prune(place, steps, numbers, dry_run="--dry_run" in arguments.flags)
    for line in lines:
        print(one_line(line))
    return DONE


def _verify(location: str, steps: Sequence[int]) -> int:
    from sophia_levanter.commands import checkpoint_report as report

    damaged = 0
    for step in steps:
        wrong, summary = report.verify(location, step)
        damaged += bool(wrong)
        for line in wrong:
            print(one_line(f"step {step}: {line}"))
        print(f"step {step}: {summary}", flush=True)
    return FAILURE if damaged else DONE


def _prune(place: Place, steps: Sequence[int], numbers: dict[str, int], *, dry_run: bool) -> int:
    from sophia_levanter import checkpoint
    from sophia_levanter.commands import checkpoint_report as report

    run = _run_of(place)
    if run is not None and not dry_run:
        run.lock()
    try:
        best = report.best_step(place.location, steps)
        going = checkpoint.Retention(numbers["--keep"], every=numbers.get("--every"), best=best).surplus(list(steps))
        staying = [step for step in steps if step not in going]
        shown = ", ".join(map(str, staying))
        if going and not any(checkpoint.damage(place.location, step) == [] for step in reversed(staying)):
            print(
                f"error: none of the steps to keep ({shown}) is intact; nothing was removed",
                file=sys.stderr,
            )
            return FAILURE
        for step in going:
            size = report.size_of_step(place.location, step)
            if not dry_run:
                checkpoint.remove(place.location, step)
            print(f"{'would remove' if dry_run else 'removed'} step {step}, {size}", flush=True)
        if run is not None and not dry_run:  # not in a bucket, where a save may be in progress
            checkpoint.remove_leftovers(place.location)
        print(f"{'steps to keep' if dry_run else 'steps kept'}: {shown}; best: {best or 'unknown'}")
    finally:
        if run is not None:
            run.unlock()
    return DONE


def _run_of(place: Place) -> RunDirectory | None:
    """Return the run directory to lock so that no run writes to `place`, or None for a bucket, which has no lock."""
    from sophia_levanter.run.directory import RunDirectory

    if place.run_dir is not None:
        inside = place.location == str(place.run_dir / "checkpoints")
        return RunDirectory(place.run_dir, "never", None if inside else place.location)
    return None if "://" in place.location else RunDirectory(Path(place.location), "never")


if __name__ == "__main__":
    sys.exit(main())
