"""TPU slices by the names that Google Cloud gives them: their chips, hosts and topologies, in one table.

Facts from https://cloud.google.com/tpu/docs (v4, v5e, v5p and v6e; runtime versions), read in November 2026.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sophia_levanter.errors import InputError
from sophia_levanter.planning.target import GIB, TPUS


@dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    Attributes:
        type_prefix: of its slices' names.
        cores_per_chip: that the number in such a name counts; 1 where it counts chips.
        runtime_version: of the hosts' system.
        topologies: by chips.
    """

    type_prefix: str
    cores_per_chip: int
    runtime_version: str
    topologies: dict[int, str]


def _by_chips(*topologies: str) -> dict[int, str]:
    return {math.prod(map(int, topology.split("x"))): topology for topology in topologies}


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-ubuntu2204-base", _by_chips(*_CUBES)),
    "v5e": Generation("v5litepod", 1, "v2-alpha-tpuv5-lite", _by_chips(*_SQUARES)),
    "v5p": Generation("v5p", 2, "v2-alpha-tpuv5", _by_chips(*_CUBES, "16x16x16", "16x16x24")),
    "v6e": Generation("v6e", 1, "v2-alpha-tpuv6e", _by_chips(*_SQUARES)),
}


@dataclass(frozen=True)
class TpuShape:
    """A slice.

    Attributes:
        accelerator_type: its name: v4-32.
        generation: v4, v5e, v5p or v6e.
        topology: chips along each axis: 2x2x4.
        chips: in all.
        hosts: machines that they are in, with as many processes of a run.
        memory: bytes of all chips.
        runtime_version: of the hosts' system, where another is not asked for.
    """

    accelerator_type: str
    generation: str
    topology: str
    chips: int
    hosts: int
    memory: float
    runtime_version: str

    def __str__(self) -> str:
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        return f"{self.accelerator_type}: {self.chips} chips ({self.topology}), {hosts}, {self.memory / GIB:,.0f} GiB"


def tpu_shape(accelerator_type: str) -> TpuShape:
    """The slice of a name such as v4-32, v5litepod-16, v5p-8 or v6e-256; v5e-16 is v5litepod-16.

    Raises:
        InputError: if there is none of that name; says which there are.
    """
    match = re.fullmatch(r"(v4|v5litepod|v5e|v5p|v6e)-(\d{1,5})", accelerator_type)
    if match is None:
        raise InputError(
            f"accelerator is {accelerator_type!r}; it must be a TPU slice such as v4-32, v5e-16, v5p-8 or v6e-64"
        )
    name = "v5e" if match[1] == "v5litepod" else match[1]
    generation = GENERATIONS[name]
    shapes = {shape.accelerator_type: shape for shape in shapes_of(name)}
    wanted = f"{generation.type_prefix}-{int(match[2])}"
    if wanted not in shapes:
        raise InputError(f"accelerator is {accelerator_type!r}; slices of {name} are {', '.join(shapes)}")
    return shapes[wanted]


def shapes_of(name: str) -> list[TpuShape]:
    """All slices of a generation, small ones first."""
    generation = GENERATIONS[name]
    flat = generation.cores_per_chip == 1
    return [
        TpuShape(
            accelerator_type=f"{generation.type_prefix}-{chips * generation.cores_per_chip}",
            generation=name,
            topology=topology,
            chips=chips,
            # A host of v5e and v6e has eight chips where that is the whole slice, otherwise four as v4's and v5p's.
            hosts=1 if flat and chips <= 8 else chips // 4,
            memory=chips * TPUS[name].memory,
            runtime_version=generation.runtime_version,
        )
        for chips, topology in generation.topologies.items()
    ]
