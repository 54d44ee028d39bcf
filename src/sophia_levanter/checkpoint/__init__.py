"""Checkpoints: any pytree of arrays, one tensorstore (zarr3) array a leaf, committed by a rename.

    DIRECTORY/step-00000010/manifest.json                                what must be there, with digests
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/zarr.json
    DIRECTORY/step-00000010/arrays/0003-model.head.weight/c.0.1          a chunk: one device's shard when it was saved

A step is written as `step-00000010.partial-*` and renamed when all of it is on the disk; one that goes is renamed to
`step-00000010.removed-*` first. So a folder with a step's plain name is complete, whenever the process was killed, and
the two other kinds are leftovers. Damage done later (a flipped bit, a lost or foreign file) is found by the digests.
"""

from sophia_levanter.checkpoint.manifest import JSON, CheckpointError
from sophia_levanter.checkpoint.step_folder import Restored, remove_leftovers, restore, save, steps

__all__ = ["JSON", "CheckpointError", "Restored", "remove_leftovers", "restore", "save", "steps"]
