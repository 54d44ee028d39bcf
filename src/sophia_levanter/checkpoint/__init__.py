"""Checkpoints of any pytree of arrays: one tensorstore (zarr3) array per leaf, on disk or in a bucket.

    DIRECTORY/step-00000010/manifest.json                                the list of arrays and files, with digests
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/zarr.json
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/c.0.1          a chunk: one device's shard at save time

On disk, a step is written as `step-00000010.partial-*` and renamed once it is complete. Before a step is removed, it is
renamed to `step-00000010.removed-*`. In a bucket, each save has its own `arrays-*` folder, and a step exists once its
manifest does; a save never overwrites the manifest of an intact step. Every visible step is therefore complete, no
matter when a process is killed, and everything else is a leftover. The digests detect later damage, such as flipped
bits, missing files or files from other checkpoints.
"""

from sophia_levanter.checkpoint.manifest import JSON, CheckpointError, Manifest, SavedArray
from sophia_levanter.checkpoint.restoring import (
    Restored,
    check_writable,
    damage,
    read_arrays,
    read_step,
    remove,
    remove_leftovers,
    restore,
    steps,
)
from sophia_levanter.checkpoint.saving import Retention, Saver, copy_step, save

__all__ = [
    "JSON",
    "CheckpointError",
    "Manifest",
    "Restored",
    "Retention",
    "SavedArray",
    "Saver",
    "check_writable",
    "copy_step",
    "damage",
    "read_arrays",
    "read_step",
    "remove",
    "remove_leftovers",
    "restore",
    "save",
    "steps",
]
