"""The devices that a plan is for: TPU topologies, which are compiled for as they are, or a number of others."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sophia_levanter.errors import InputError

GIB = 2**30
# For libtpu, which looks at these when it starts: it is to describe a machine, not to look for one.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        memory: bytes that a program can have.
        peak_flops: dense bfloat16 FLOP/s as published.
        topology: what libtpu needs to be told to compile for it; None where there is no such compiler.
        longest_side: chips along the longest side of the largest slice.
    """

    memory: float
    peak_flops: float
    topology: dict[str, Any] | None = None
    longest_side: int = 16


TPUS = {
    "v4": Chip(32 * GIB, 275e12, {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}),
    "v5p": Chip(
        95 * GIB, 459e12, {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}, longest_side=28
    ),
    "v5e": Chip(16 * GIB, 197e12, {"chips_per_host_bounds": (2, 2, 1)}),
    "v6e": Chip(32 * GIB, 918e12, {"chips_per_host_bounds": (2, 2, 1)}),
}
# Of the memory on the card, what a driver and its context leave.
GPUS = {
    "a100-40": Chip(38 * GIB, 312e12),
    "a100-80": Chip(77 * GIB, 312e12),
    "h100": Chip(77 * GIB, 989e12),
    "h200": Chip(138 * GIB, 989e12),
}


@dataclass(frozen=True)
class Target:
    """Where a run is to go.

    Attributes:
        name: for people.
        num_devices: how many chips.
        chip: of what kind.
        topology: as libtpu calls it; None for devices that are pretended on this machine's CPU.
    """

    name: str
    num_devices: int
    chip: Chip
    topology: str | None = None

    def devices(self) -> Sequence[Any]:
        """The devices to compile for. For the first call of a process that uses jax.

        Raises:
            InputError: if libtpu is not installed, or does not know the topology.
        """
        import jax

        if self.topology is None:
            jax.config.update("jax_num_cpu_devices", self.num_devices)
            return jax.devices("cpu")
        from jax.experimental import topologies

        for name, value in LIBTPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=self.topology, **(self.chip.topology or {})
            )
        except Exception as error:
            if importlib.util.find_spec("libtpu") is None:
                raise InputError("--target needs libtpu: pip install 'sophia-levanter[tpu]'") from None
            raise InputError(f"--target {self.name}: {' '.join(str(error).split())[:200]}") from None
        return described.devices


def tpu_target(text: str) -> Target:
    """A TPU topology such as `v4:2x2x4`.

    Raises:
        InputError: if it is none.
    """
    match = re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9})+)", text)
    if match is None or match[1] not in TPUS:
        raise InputError(
            f"--target is {text!r}; it must be a TPU and its chips along each axis, such as v4:2x2x4 or v5e:4x8 "
            f"({', '.join(TPUS)})"
        )
    sides = [int(n) for n in match[2].split("x")]
    if min(sides) < 1 or max(sides) > TPUS[match[1]].longest_side:
        raise InputError(
            f"--target is {text!r}; a side of {match[1]} has between 1 and {TPUS[match[1]].longest_side} chips"
        )
    if len(sides) != (3 if match[1] in ("v4", "v5p") else 2):
        shape = "v4:2x2x4" if match[1] in ("v4", "v5p") else "v5e:4x8"
        raise InputError(f"--target is {text!r}; {match[1]} chips lie along {shape.count('x') + 1} axes, as in {shape}")
    return Target(text, math.prod(sides), TPUS[match[1]], text)


def pretended_target(num_devices: int, gpu: str) -> Target:
    """Devices whose program is compiled for this machine's CPU: what it says of them is approximate.

    Raises:
        InputError: if there is no such GPU, or no device.
    """
    if num_devices < 1:
        raise InputError(f"--devices is {num_devices}; it must be at least 1")
    if gpu not in GPUS:
        raise InputError(f"--gpu is {gpu!r}; it must be one of {', '.join(GPUS)}")
    return Target(f"{num_devices} x {gpu}", num_devices, GPUS[gpu])
