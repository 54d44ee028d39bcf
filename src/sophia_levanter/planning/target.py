"""The target devices of a plan, and Google Cloud's TPU slices.

The data on slices is from https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e; runtime versions), as of November 2026.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sophia_levanter.accelerators import GIB, GPUS, TPUS, Chip
from sophia_levanter.errors import InputError, counted

GPUS_OF_A_NODE = 8
SLICE_NAME = r"(v4|v5litepod|v5e|v5p|v6e)-(\d{1,5})"
# libtpu reads these variables when it starts. With them, it describes a machine instead of searching for one.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}


@dataclass(frozen=True)
class Target:
    """The devices for which to plan a run.

    Attributes:
        name: the target's name, for display.
        num_devices: number of chips.
        chip: the kind of chip.
        topology: libtpu's name for a slice's topology; None for devices simulated on this machine's CPU.
        num_slices: number of slices, which are connected by slow links.
    """

    name: str
    num_devices: int
    chip: Chip
    topology: str | None = None
    num_slices: int = 1

    @property
    def num_nodes(self) -> int:
        """Number of groups of devices connected by slow links: TPU slices, or nodes of eight GPUs."""
        return self.num_slices if self.topology else -(-self.num_devices // GPUS_OF_A_NODE)

    def devices(self) -> Sequence[Any]:
        """Return the devices to compile for. This must be the first use of jax in the process.

        Raises:
            InputError: if libtpu is not installed or does not know the topology.
        """
        import jax

        if self.topology is None:
            jax.config.update("jax_num_cpu_devices", self.num_devices)
            return jax.devices("cpu")
        from jax.experimental import topologies

        for name, value in LIBTPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options = dict(self.chip.topology or {})
        if self.num_slices > 1:
            options["num_slices"] = self.num_slices
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=self.topology, **options)
        except Exception as error:
            if importlib.util.find_spec("libtpu") is None:
                raise InputError("--target requires libtpu; run pip install 'sophia-levanter[tpu]'") from None
            raise InputError(f"--target {self.name}: {' '.join(str(error).split())[:200]}") from None
        return described.devices


def node_of(device: Any) -> int:
    """Return the index of a device's node or slice, within which links are fast. Simulated nodes have eight GPUs."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else device.id // GPUS_OF_A_NODE


def tpu_target(text: str) -> Target:
    """Parse TPU slices given by name or topology: `v4-32`, `v4:2x2x4`, or `2xv4-32` for two slices of 16 chips each.

    Raises:
        InputError: if the text is not a valid name or topology.
    """
    count = re.match(r"(\d{1,3})x(?=v)", text)
    if count is None:
        return _slice_target(text)
    num_slices, one = int(count[1]), _slice_target(text[count.end() :])
    if num_slices < 1:
        raise InputError(f"--target is {text!r}; the number of slices must be at least 1")
    devices = num_slices * one.num_devices
    return replace(one, name=f"{num_slices} x {one.name}", num_devices=devices, num_slices=num_slices)


def _slice_target(text: str) -> Target:
    """Parse a slice given by its Google Cloud name, such as `v4-32`, or its topology, such as `v4:2x2x4`."""
    if re.fullmatch(SLICE_NAME, text):
        found = tpu_shape(text, "--target")
        topology = f"{found.generation}:{found.topology}"
        return Target(f"{text} ({found.topology})", found.chips, TPUS[found.generation], topology)
    match = re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9})+)", text)
    if match is None or match[1] not in TPUS:
        raise InputError(
            f"--target is {text!r}; it must be a TPU slice such as v4-32, several slices such as 2xv4-32, or a TPU "
            f"type and topology such as v4:2x2x4 or v5e:4x8 (types: {', '.join(TPUS)})"
        )
    sides = [int(n) for n in match[2].split("x")]
    if min(sides) < 1 or max(sides) > TPUS[match[1]].longest_side:
        largest = TPUS[match[1]].longest_side
        raise InputError(
            f"--target is {text!r}; each dimension of a {match[1]} topology must be between 1 and {largest}"
        )
    if len(sides) != (3 if match[1] in ("v4", "v5p") else 2):
        shape = "v4:2x2x4" if match[1] in ("v4", "v5p") else "v5e:4x8"
        raise InputError(
            f"--target is {text!r}; {match[1]} topologies have {shape.count('x') + 1} dimensions, such as {shape}"
        )
    return Target(text, math.prod(sides), TPUS[match[1]], text)


def pretended_target(num_devices: int, gpu: str) -> Target:
    """Return a GPU target. Its steps are compiled for this machine's CPU, so the plan is approximate.

    Raises:
        InputError: if the kind of GPU is unknown or `num_devices` is below 1.
    """
    if num_devices < 1:
        raise InputError(f"--devices is {num_devices}; it must be at least 1")
    if gpu not in GPUS:
        raise InputError(f"--gpu is {gpu!r}; it must be one of {', '.join(GPUS)}")
    return Target(f"{num_devices} x {gpu}", num_devices, GPUS[gpu])


@dataclass(frozen=True)
class Generation:
    """A TPU generation.

    Attributes:
        type_prefix: prefix of slice names.
        cores_per_chip: number of cores per chip if the number in a slice name counts cores; 1 if it counts chips.
        runtime_version: version of the system software on hosts.
        topologies: topologies, keyed by number of chips.
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
    """The shape of a TPU slice.

    Attributes:
        accelerator_type: the slice's name, such as v4-32.
        generation: v4, v5e, v5p or v6e.
        topology: chips along each axis, such as 2x2x4.
        chips: number of chips.
        hosts: number of hosts, which is also the number of processes in a run.
        memory: total memory of all chips, in bytes.
        runtime_version: the default version of the system software on hosts.
    """

    accelerator_type: str
    generation: str
    topology: str
    chips: int
    hosts: int
    memory: float
    runtime_version: str

    def __str__(self) -> str:
        size = f"{counted(self.chips, 'chip')} ({self.topology}), {counted(self.hosts, 'host')}"
        return f"{self.accelerator_type}: {size}, {self.memory / GIB:,.0f} GiB"


def tpu_shape(accelerator_type: str, field: str = "accelerator") -> TpuShape:
    """Return the shape of the slice with a name such as v4-32, v5litepod-16 (also called v5e-16), v5p-8 or v6e-256.

    Raises:
        InputError: if the name is unknown; the message suggests valid names.
    """
    match = re.fullmatch(SLICE_NAME, accelerator_type)
    if match is None:
        raise InputError(
            f"{field} is {accelerator_type!r}; it must be a TPU slice such as v4-32, v5e-16, v5p-8 or v6e-64"
        )
    name = "v5e" if match[1] == "v5litepod" else match[1]
    generation = GENERATIONS[name]
    shapes = {shape.accelerator_type: shape for shape in shapes_of(name)}
    wanted = f"{generation.type_prefix}-{int(match[2])}"
    if wanted not in shapes:
        raise InputError(f"{field} is {accelerator_type!r}; it must be one of {', '.join(shapes)}")
    return shapes[wanted]


def shapes_of(name: str) -> list[TpuShape]:
    """Return all slices of a generation, smallest first."""
    generation = GENERATIONS[name]
    flat = generation.cores_per_chip == 1
    return [
        TpuShape(
            accelerator_type=f"{generation.type_prefix}-{chips * generation.cores_per_chip}",
            generation=name,
            topology=topology,
            chips=chips,
            # v5e and v6e slices with up to eight chips have one host. All other hosts have four chips.
            hosts=1 if flat and chips <= 8 else chips // 4,
            memory=chips * TPUS[name].memory,
            runtime_version=generation.runtime_version,
        )
        for chips, topology in generation.topologies.items()
    ]
