"""Checkpoints: any pytree of arrays, one tensorstore (zarr3) array a leaf, on a disk or in a bucket.

    DIRECTORY/step-00000010/manifest.json                                what must be there, with digests
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/zarr.json
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/c.0.1          a chunk: one device's shard when it was saved

On a disk a step is written as `step-00000010.partial-*` and renamed when all of it is there; one that goes is renamed
to `step-00000010.removed-*` first. In a bucket the arrays of each save lie in an `arrays-*` of their own, and the step
is there when its manifest is, which is written on condition that there is none. So a step that can be seen is complete,
whenever the process was killed, and the rest are leftovers. Damage done later (a flipped bit, a lost or foreign file)
is found by the digests.
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
