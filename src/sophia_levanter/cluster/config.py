"""A cluster's file: where the processes of a run are started, and how often. Free of jax and Ray."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from sophia_levanter.cluster.tpu_shapes import TpuShape, tpu_shape
from sophia_levanter.command_line import convert_value
from sophia_levanter.config_file import Layer, Setting, read_layers, show_value
from sophia_levanter.errors import InputError

LARGEST = 1_000_000
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MASK = "***"  # what is shown in place of a value
# Names of variables whose values no file should hold. The words of the second line count only at the end of a name:
# RAY_AUTH_MODE is innocent. PWD is the working directory, and SSH_ASKPASS the path of a program.
SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|CRED|COOKIE|JWT|BEARER|AUTHORIZATION)S?\d*(_|$)"
    r"|(?<!BY)(?<!COM)(?<!ASK)PASS\d*$|AUTH\d*$|(^|_)(PRIVATE|DSN)\d*$|_PWD\d*$"
)


@dataclass(frozen=True)
class ClusterConfig:
    """What every backend has: environments, and how a run goes on after its processes have ended.

    Raises:
        InputError: if a value is out of its range.
    """

    backend: ClassVar[str]

    env: Mapping[str, str] = field(default_factory=dict)  # environment variables of the training processes
    secrets: tuple[str, ...] = ()  # names of variables that are passed on, their values never written anywhere
    max_failures: int = 10  # attempts that may fail before the run is given up
    max_preemptions: int = 100  # attempts that may be preempted before it is
    back_off: float = 5.0  # seconds before the next attempt after a failure; doubles with each in a row, up to 300
    crash_loop: int = 3  # failures in a row at the same step that are taken for the run's own fault, and end it
    stop_timeout: int = 120  # seconds that processes have to save and end when they are told to

    def __post_init__(self) -> None:
        for name in ("max_failures", "max_preemptions"):
            self._at_least(name, 0)
        for name in ("crash_loop", "stop_timeout"):
            self._at_least(name, 1)
        if not 0 <= self.back_off <= 300:
            raise InputError(f"back_off is {self.back_off}; it must be between 0 and 300")
        for name in (*self.env, *self.secrets):
            if not NAME.fullmatch(name):
                raise InputError(f"{name!r} is no name of an environment variable")
        for name in self.env:
            if SECRET.search(name.upper()):
                raise InputError(
                    f"env.{name} looks like a secret; name it under secrets, and keep its value out of files"
                )

    @property
    def num_devices(self) -> int | None:
        """That the run has in all; None where the file does not tell."""
        return None

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if getattr(self, name) > LARGEST:
            raise InputError(f"{name} is {getattr(self, name)}; it must be at most {LARGEST}")


@dataclass(frozen=True)
class LocalCluster(ClusterConfig):
    """Processes on this machine."""

    backend = "local"

    processes: int = 1  # that the run has

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("processes", 1)
        if self.processes > 1024:
            raise InputError(f"processes is {self.processes}; it must be at most 1024, all on this machine")


@dataclass(frozen=True)
class RayCluster(ClusterConfig):
    """Workers of a Ray cluster: one training process each."""

    backend = "ray"

    address: str = "auto"  # of the cluster: auto for the one that this machine belongs to, local to start one here
    auth: str = "disabled"  # RAY_AUTH_MODE: disabled, or token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH set
    workers: int | None = None  # processes of the run, each on resources of its own; of a TPU slice one a host
    cpus_per_worker: float = 1.0  # that Ray sets aside for each
    gpus_per_worker: int = 0  # that each has
    accelerator: str | None = None  # TPU slices such as v4-32, in place of workers
    slices: int = 1  # of them
    start_timeout: int = 1800  # seconds to wait for nodes, which may have to be bought first

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address not in ("auto", "local") and not re.fullmatch(r"[\w.\-\[\]:]+:\d{1,5}", self.address):
            raise InputError(
                f"address is {self.address!r}; it must be auto, local or HOST:PORT, and the launcher run on a machine "
                "of the cluster"
            )
        if self.auth not in ("disabled", "token"):
            raise InputError(f"auth is {self.auth!r}; it must be disabled or token")
        for name in ("slices", "start_timeout"):
            self._at_least(name, 1)
        self._at_least("gpus_per_worker", 0)
        if self.cpus_per_worker <= 0:
            raise InputError(f"cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
        if (self.workers is None) == (self.accelerator is None):
            raise InputError(
                "give either workers, how many processes the run has, or accelerator, a TPU slice such as v4-32"
            )
        if self.workers is not None:
            self._at_least("workers", 1)
        if self.accelerator is None and self.slices > 1:
            raise InputError(f"slices is {self.slices}, which goes with accelerator, a TPU slice such as v4-32")
        if self.accelerator is not None and self.gpus_per_worker:
            raise InputError(f"gpus_per_worker is {self.gpus_per_worker}, and accelerator {self.accelerator} is a TPU")
        if self.accelerator is not None:
            tpu_shape(self.accelerator)

    @property
    def shape(self) -> TpuShape | None:
        """Of one slice."""
        return None if self.accelerator is None else tpu_shape(self.accelerator)

    @property
    def num_processes(self) -> int:
        """That the run has."""
        return self.slices * self.shape.hosts if self.shape else self.workers or 0

    @property
    def num_devices(self) -> int | None:
        return self.slices * self.shape.chips if self.shape else self.num_processes * self.gpus_per_worker or None


@dataclass(frozen=True)
class SlurmCluster(ClusterConfig):
    """A Slurm job: one training process on each node, all its GPUs in it."""

    backend = "slurm"

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None  # null: all of a node's
    partition: str | None = None
    account: str | None = None
    time: str | None = None  # of one job, such as 12:00:00; a job that comes to its end saves, and is queued again
    save_before: int = 180  # seconds before the end of that time at which the run saves
    options: tuple[str, ...] = ()  # more of sbatch's: --qos=high
    setup: tuple[str, ...] = ()  # lines of shell before the run: module load cuda/13, source .venv/bin/activate
    python: str = "python"  # after those lines

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "save_before"):
            self._at_least(name, 1)
        self._at_least("gpus_per_node", 0)
        if self.save_before < self.stop_timeout + 30:
            raise InputError(
                f"save_before is {self.save_before}; it must be at least stop_timeout {self.stop_timeout} + 30, for a "
                "save to be over before the job's time is"
            )
        if self.cpus_per_node is not None:
            self._at_least("cpus_per_node", 1)
        for name in ("partition", "account", "time"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                raise InputError(f"{name} is {value!r}; it must be one word")
        for option in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", option):
                raise InputError(f"options holds {option!r}; an option of sbatch looks like --qos=high")
        if any("\n" in line for line in self.setup):
            raise InputError("setup holds an item with a line break; each is one line of shell")

    @property
    def num_devices(self) -> int | None:
        return self.nodes * self.gpus_per_node or None


@dataclass(frozen=True)
class GcloudCluster(ClusterConfig):
    """TPU slices of Google Cloud, bought for the run as one queued resource, their hosts reached by ssh."""

    backend = "gcloud"

    name: str | None = None  # of the queued resource; the run directory's name if not given
    project: str | None = None  # null: what gcloud is set to
    zone: str | None = None
    accelerator: str = ""  # a slice such as v4-32
    slices: int = 1
    runtime_version: str | None = None  # null: the one that goes with the accelerator
    capacity: str = "on-demand"  # or spot, or reserved
    network: str | None = None
    subnetwork: str | None = None
    internal_ips: bool = False  # no addresses that the world can reach; ssh then needs --tunnel-through-iap
    service_account: str | None = None  # that the hosts act as, with the right to write trainer.checkpoint_dir
    files: tuple[str, ...] = ()  # of this machine, for the home folder of every host: a wheel of this project
    setup: tuple[str, ...] = ()  # lines of shell on every host, once, after that: pip install that wheel
    python: str = "python3"  # on the hosts
    keep: bool = False  # leave the slices running, and paid for, when the run is over
    start_timeout: int = 24 * 3600  # seconds to wait for capacity

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.accelerator:
            raise InputError("accelerator is missing; it is a TPU slice such as v4-32")
        tpu_shape(self.accelerator)
        for name in ("slices", "start_timeout"):
            self._at_least(name, 1)
        if self.capacity not in ("on-demand", "spot", "reserved"):
            raise InputError(f"capacity is {self.capacity!r}; it must be on-demand, spot or reserved")
        if self.zone is None:
            raise InputError("zone is missing, such as us-central2-b")
        if self.name is not None and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise InputError(f"name is {self.name!r}; it must be up to 40 of a-z, 0-9 and -, a letter first")
        if any("\n" in line for line in self.setup):
            raise InputError("setup holds an item with a line break; each is one line of shell")

    @property
    def shape(self) -> TpuShape:
        """Of one slice."""
        return tpu_shape(self.accelerator)

    @property
    def num_processes(self) -> int:
        """That the run has."""
        return self.slices * self.shape.hosts

    @property
    def num_devices(self) -> int | None:
        return self.slices * self.shape.chips


BACKENDS: dict[str, type[ClusterConfig]] = {
    cls.backend: cls for cls in (LocalCluster, RayCluster, SlurmCluster, GcloudCluster)
}


def read_cluster(path: Path) -> ClusterConfig:
    """Reads a cluster's file: `backend: NAME` and that backend's fields.

    Raises:
        InputError: if it is not YAML, a key is unknown, or a value is of the wrong type or out of range.
    """
    settings: Layer = {}
    for layer in read_layers(path):
        settings |= layer
    if "backend" not in settings:
        raise InputError(f"{path}: backend is missing; it must be one of {', '.join(BACKENDS)}")
    backend = settings.pop("backend").value
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError(f"{path}: backend is {show_value(backend)}; it must be one of {', '.join(BACKENDS)}")
    cls = BACKENDS[backend]
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, setting in settings.items():
        section, _, variable = key.partition(".")
        if section == "env":
            if variable and not isinstance(setting.value, str):
                raise InputError(
                    f"{setting.prefix}env.{variable} is {_kind(setting.value)}; it must be a string, in quotes"
                )
            if variable:
                values.setdefault("env", {})[variable] = setting.value
            elif setting.value:
                raise InputError(f"{setting.prefix}env is {_kind(setting.value)}; it must be a section of NAME: VALUE")
        elif key not in names:
            raise InputError(f"{setting.prefix}unknown key {key!r}; {_nearest(key, names, backend)}")
        elif typing.get_origin(hints[key]) is tuple:
            values[key] = _words(key, setting)
        else:
            values[key] = convert_value(key, setting, hints[key])
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _kind(value: Any) -> str:
    """A value of `env` for an error message, which must not hold it."""
    return show_value(value) if isinstance(value, dict | list | None) else f"{MASK} ({type(value).__name__})"


def _words(key: str, setting: Setting) -> tuple[str, ...]:
    if not isinstance(setting.value, list):
        raise InputError(f"{setting.prefix}{key} is {show_value(setting.value)}; it must be a list of strings")
    for word in setting.value:
        if not isinstance(word, str):
            raise InputError(f"{setting.prefix}{key} holds {show_value(word)}; it must be a list of strings")
    return tuple(setting.value)


def _nearest(key: str, names: list[str], backend: str) -> str:
    if nearest := difflib.get_close_matches(key, names, n=1):
        return f"did you mean {nearest[0]!r}?"
    return f"the fields of backend {backend} are {', '.join(names)}"
