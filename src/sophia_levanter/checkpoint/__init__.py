"""Checkpoints: any pytree of arrays, one tensorstore (zarr3) array per leaf, on a disk or in a bucket.

    DIRECTORY/step-00000010/manifest.json                                the list of arrays and files, with digests
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/zarr.json
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/c.0.1          a chunk: one device's shard when it was saved

On a disk, a step is written as `step-00000010.partial-*` and renamed when it is complete; a step to be removed is
renamed to `step-00000010.removed-*` first. In a bucket, each save has its own folder `arrays-*`, and the step exists
once its manifest does, which is written only if none exists. So every visible step is complete, whenever the process
was killed, and everything else is a leftover. The digests find later damage, such as a flipped bit or a lost or foreign
file.
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
