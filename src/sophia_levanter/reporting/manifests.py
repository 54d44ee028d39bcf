"""The newest checkpoint of a run that can be read, for what it says of text and machine."""

from __future__ import annotations

from sophia_levanter import checkpoint
from sophia_levanter.checkpoint import CheckpointError, Manifest
from sophia_levanter.errors import InputError
from sophia_levanter.run.directory import RunDirectory

FACTS = ("environment", "data", "validation")


def newest_manifest(directory: RunDirectory) -> tuple[Manifest | None, str]:
    """The manifest of the newest checkpoint that is whole and a training run's; and in words, where it was found.

    Args:
        directory: of the run, with the place of its checkpoints.
    """
    location = str(directory.checkpoints)
    if "://" in location:
        return None, f"not looked at: {location}"
    damaged: list[str] = []
    for step in reversed(checkpoint.steps(location)):
        try:
            manifest = checkpoint.read_step(location, step)
        except (CheckpointError, InputError):
            damaged.append(f"step {step} is damaged")
            continue
        if all(isinstance(manifest.metadata.get(name), dict) for name in FACTS):
            return manifest, "; ".join([*damaged, f"step {step}"])
        damaged.append(f"step {step} is no training run's")
    return None, "; ".join(damaged) or "none yet"
