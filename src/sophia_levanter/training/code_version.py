"""Which version of the code a run is of."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import sophia_levanter

GIT_SECONDS = 10


def code_version() -> dict[str, Any]:
    """The package's version; if git knows it, the commit and whether tracked files differ from it (`dirty`).

    The repository is that of the source that is run, or the working directory's where an installed package is run.
    """
    package = Path(sophia_levanter.__file__).parent
    # A virtual environment may lie inside the repository of something else, which does not track it.
    tracked = _git(package, "ls-files", "--error-unmatch", Path(sophia_levanter.__file__).name) is not None
    place = package if tracked else Path.cwd()
    found: dict[str, Any] = {"version": sophia_levanter.__version__}
    commit = _git(place, "rev-parse", "HEAD")
    status = _git(place, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return found
    return found | {"commit": commit, "dirty": bool(status), "repository": "source" if tracked else "working directory"}


def _git(directory: Path, *arguments: str) -> str | None:
    """What git says; None if it is not there, refuses or does not answer."""
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
