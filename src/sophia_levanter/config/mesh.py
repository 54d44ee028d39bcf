"""Mesh settings, and checks that they fit the model, the devices and the launcher. This module does not import jax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError, Problems

MESH_AXES = ("replica", "data", "sequence", "model")
TENSOR_AXES = ("heads", "mlp", "vocab")

# Environment variables that launchers set to the number of processes, each with the variables that must accompany it.
# In Slurm, only the number of tasks in the step counts: a job script or a shell in an allocation is a single process,
# even if SLURM_NTASKS and SLURM_PROCID are set.
PROCESS_COUNTS = {
    "SLURM_STEP_NUM_TASKS": ("SLURM_STEP_ID", "SLURM_PROCID"),  # srun
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK",),  # Open MPI's mpirun
    "PMI_SIZE": ("PMI_RANK",),  # mpirun from MPICH and Intel MPI
    "WORLD_SIZE": ("RANK", "LOCAL_RANK"),  # torchrun
}


@dataclass(frozen=True)
class MeshConfig(Settings):
    """The layout of the devices, and the mesh axes over which the model's named axes are sharded.

    Raises:
        InputError: if a size is out of range or an axis has an unknown name.
    """

    section: ClassVar[str] = "mesh"

    replica: int = setting(
        1, "device groups connected by slow links (slices, nodes); each holds all parameters and its own rows", low=1
    )
    data: int = setting(-1, "number of devices per group, each with its own rows; -1: all remaining devices")
    sequence: int = setting(1, "number of devices over which positions are sharded (sequence parallelism)", low=1)
    model: int = setting(1, "number of devices over which heads, mlp and vocab are sharded (tensor parallelism)", low=1)
    fsdp: str | None = setting(
        None,
        "named axis of parameters, gradients and optimizer state to shard over data",
        choices=("embed", "mlp", "heads", "vocab", "layers"),
    )
    heads: str | None = setting("model", "mesh axis over which attention heads are sharded", choices=("model",))
    mlp: str | None = setting("model", "mesh axis over which the MLP's hidden units are sharded", choices=("model",))
    vocab: str | None = setting("model", "mesh axis over which the vocabulary is sharded", choices=("model",))
    position: str | None = setting("sequence", "mesh axis over which positions are sharded", choices=("sequence",))
    coordinator: str | None = setting(None, "HOST:PORT on which process 0 listens; auto: detect on TPU pods and Slurm")
    num_processes: int | None = setting(None, "with HOST:PORT only: number of processes in the run", low=1)
    process_id: int | None = setting(None, "with HOST:PORT only: index of this process, starting at 0", low=0)
    start_timeout: int = setting(300, "seconds to wait for the other processes", low=1)
    heartbeat_timeout: int = setting(
        20, "seconds without a heartbeat before a process is considered dead and all processes exit", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data < 1 and self.data != -1:
            raise InputError(f"mesh.data is {self.data}; it must be at least 1, or -1 for all remaining devices")
        self._check_processes()

    def _check_processes(self) -> None:
        count, this = self.num_processes, self.process_id
        if self.coordinator is None or self.coordinator == "auto":
            for name, value in (("num_processes", count), ("process_id", this)):
                if value is not None:
                    raise InputError(f"mesh.{name} {value} requires mesh.coordinator HOST:PORT")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"mesh.coordinator is {self.coordinator!r}; it must be HOST:PORT, auto or null")
        if count is None or this is None:
            missing = "num_processes" if count is None else "process_id"
            raise InputError(f"mesh.{missing} is missing; mesh.coordinator {self.coordinator} requires it")
        if this >= count:
            raise InputError(f"mesh.process_id is {this}; it must be from 0 to {count - 1} (mesh.num_processes - 1)")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Return the size of each mesh axis for `num_devices` devices, in mesh order.

        Raises:
            InputError: if the product of the sizes is not `num_devices`; the message suggests sizes that fit.
        """
        if (self.num_processes or 1) > num_devices:
            raise InputError(
                f"mesh.num_processes is {self.num_processes}, but there are only {num_devices} devices; "
                "each process requires at least one"
            )
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        others = math.prod(size for name, size in sizes.items() if name != "data")
        if sizes["data"] == -1:
            sizes["data"] = max(1, num_devices // others)
        if math.prod(sizes.values()) == num_devices:
            return sizes
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "data 1"
        raise InputError(
            f"mesh: {shown} requires {math.prod(sizes.values())} devices, but there are {num_devices}; "
            f"use {self._fitting(num_devices)}"
        )

    def _fitting(self, num_devices: int) -> str:
        """Describe the nearest sizes whose product is the number of devices. Only `data` may exceed its setting."""
        rest, sizes = num_devices, {}
        for name in ("model", "sequence", "replica"):
            sizes[name] = max(n for n in range(1, getattr(self, name) + 1) if rest % n == 0)
            rest //= sizes[name]
        others = [f"mesh.{name} {size}" for name, size in sizes.items() if size > 1 or getattr(self, name) > 1]
        return " with ".join([f"mesh.data {rest}", " and ".join(others)] if others else [f"mesh.data {rest}"])

    @property
    def compute_mapping(self) -> dict[str, tuple[str, ...]]:
        """The mesh axes over which each named axis is sharded in activations, and in parameters while they are used."""
        named = {name: getattr(self, name) for name in (*TENSOR_AXES, "position")} | {"kv_heads": self.heads}
        return {"batch": ("replica", "data")} | {name: (axis,) for name, axis in named.items() if axis is not None}

    @property
    def parameter_mapping(self) -> dict[str, tuple[str, ...]]:
        """The mesh axes over which each named axis is sharded in stored parameters, optimizer state and gradients."""
        mapping = self.compute_mapping
        if self.fsdp is not None:
            mapping[self.fsdp] = (*mapping.get(self.fsdp, ()), "data")
        return mapping


def check_launcher(config: MeshConfig, environment: Mapping[str, str]) -> None:
    """Check that no launcher started several unconnected processes, which would each train a separate model.

    Args:
        config: the mesh settings; `mesh.coordinator` connects the processes.
        environment: the environment variables of this process.

    Raises:
        InputError: if a launcher started several unconnected processes; the message names the environment variable.
    """
    if config.coordinator is not None:
        return
    for name, others in PROCESS_COUNTS.items():
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1 and all(other in environment for other in others):
            raise InputError(
                f"{name} is {count}, but mesh.coordinator is null, so each of the {count} processes would train its "
                "own model; for a single run, use python -m sophia_levanter.commands.launch or set mesh.coordinator, "
                f"mesh.num_processes and mesh.process_id; for separate runs, unset {name}"
            )


def check_divides(
    sizes: dict[str, int],
    mapping: dict[str, tuple[str, ...]],
    axes: dict[str, tuple[str, int]],
    *,
    of: tuple[str, int] | None = None,
) -> None:
    """Check that the size of each named axis is divisible by the number of devices over which the axis is sharded.

    Args:
        sizes: the size of each mesh axis.
        mapping: the mesh axes over which each named axis is sharded.
        axes: for each named axis, the configuration field that sets its size, and the size.
        of: a field and its value. If given, suggested sizes divide this value.

    Raises:
        InputError: if a size is not divisible; the message names each field, the mesh axes and the nearest valid size.
    """
    problems = Problems()
    for name, (field, size) in axes.items():
        over = {axis: sizes[axis] for axis in mapping.get(name, ()) if sizes[axis] > 1}
        parts = math.prod(over.values())
        if size % parts:
            named = [f"mesh.{axis} {count}" if len(over) > 1 else f"mesh.{axis}" for axis, count in over.items()]
            nearest = nearest_multiple(size, parts, of[1] if of else None)
            multiple = f"a multiple of {parts}" + (f" that divides {of[0]} {of[1]}" if of else "")
            setting = name.removeprefix("kv_")  # mesh.heads applies to key/value heads too
            or_else = f"mesh.{setting} null" if setting in (*TENSOR_AXES, "position") else "a smaller mesh"
            with problems:
                raise InputError(
                    f"{field} {size} is not divisible by the {parts} devices on {' x '.join(named)}; "
                    f"use {multiple}, such as {nearest}, or {or_else}"
                )
    problems.report()


def nearest_multiple(size: int, parts: int, of: int | None = None) -> int:
    """Return the multiple of `parts` nearest to `size` that divides `of`, if given. `of` is a multiple of `parts`."""
    multiples = range(parts, max(size + parts, of or 0) + 1, parts)
    return min((n for n in multiples if of is None or of % n == 0), key=lambda n: abs(n - size))
