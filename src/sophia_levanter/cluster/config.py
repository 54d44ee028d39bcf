"""Cluster settings: where to start a run's processes, and how often to restart them. Does not import jax or Ray."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from draccus import ChoiceRegistry

from sophia_levanter.config.build import build
from sophia_levanter.config.files import MOST_BYTES, read_layers
from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError, Problems
from sophia_levanter.files import read_regular
from sophia_levanter.planning.target import TpuShape, tpu_shape

if TYPE_CHECKING:
    from sophia_levanter.cluster.backend import Backend, Job

LARGEST = 1_000_000
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Names of variables whose values should not be stored in files. The words on the second line match only at the end
# of a name, because RAY_AUTH_MODE is harmless, as are PWD (the working directory) and SSH_ASKPASS (a program's path).
SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|CRED|COOKIE|JWT|BEARER|AUTHORIZATION)S?\d*(_|$)"
    r"|(?<!BY)(?<!COM)(?<!ASK)PASS\d*$|AUTH\d*$|(^|_)(PRIVATE|DSN)\d*$|_PWD\d*$"
)


class Submission(NamedTuple):
    """A job that runs the launcher on another machine.

    Attributes:
        describe: returns human-readable lines that describe what `submit` would do.
        submit: submits the job, waits for it and returns its exit status. It takes a function that prints messages.
    """

    describe: Callable[[], list[str]]
    submit: Callable[[Callable[[str], None]], int]


@dataclass(frozen=True)
class ClusterConfig(Settings, ChoiceRegistry):
    """Settings shared by all backends: the environment of processes, and limits on failed and preempted attempts."""

    choice_key: ClassVar[str] = "backend"
    shares_disk: ClassVar[bool] = True  # whether the launcher can read the run directory of the processes

    env: Mapping[str, str] = setting({}, "environment variables for the training processes")
    secrets: tuple[str, ...] = setting(
        (), "names of environment variables to pass on; their values are never written anywhere"
    )
    max_failures: int = setting(10, "maximum number of failed attempts", low=0, high=LARGEST)
    max_preemptions: int = setting(100, "maximum number of preempted attempts", low=0, high=LARGEST)
    back_off: float = setting(
        5.0,
        "seconds to wait after a failure; doubles with each consecutive failure, up to 300",
        low=0,
        high=300,
    )
    crash_loop: int = setting(3, "give up after this many consecutive failures at the same step", low=1, high=LARGEST)
    stop_timeout: int = setting(
        120, "seconds that processes have to save and exit when asked to stop", low=1, high=LARGEST
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*self.env, *self.secrets):
            if not NAME.fullmatch(name):
                raise InputError(f"{name!r} is not a valid environment variable name")
        for name in self.env:
            if SECRET.search(name.upper()):
                raise InputError(
                    f"env.{name} looks like a secret; list it under secrets and keep its value out of files"
                )

    @property
    def backend(self) -> str:
        """The backend's name in cluster files."""
        return self.get_choice_name(type(self))

    @property
    def num_devices(self) -> int | None:
        """The number of devices in the whole run; None if it is not determined by the cluster file."""
        return None

    def check_files(self) -> None:
        """Check that the files to copy to the hosts exist on this machine.

        Raises:
            InputError: if files are missing; the message names them.
        """

    def check_secrets(self) -> None:
        """Check that the secrets to pass on are set in the launcher's environment.

        Raises:
            InputError: if variables are unset or empty; the message names them.
        """
        problems = Problems()
        for name in self.secrets:
            with problems:
                if not os.environ.get(name):
                    raise InputError(
                        f"secrets lists {name}, which is not set in the launcher's environment; export it first"
                    )
        problems.report()

    def build(self, job: Job) -> Backend:
        """Build the backend that starts the run's processes."""
        raise InputError(f"backend {self.backend}: {type(self).__qualname__} does not define build()")

    def submission(self, job: Job, launcher: Sequence[str]) -> Submission | None:
        """Return the job to submit if the launcher must run on another machine; None if it runs on this one.

        Args:
            job: the run.
            launcher: the launcher's command line, without the Python interpreter.
        """
        return None


@ClusterConfig.register_subclass("local")
@dataclass(frozen=True)
class LocalCluster(ClusterConfig):
    """Training processes on this machine."""

    processes: int = setting(1, "number of training processes", low=1, high=1024)

    def build(self, job: Job) -> Backend:
        from sophia_levanter.cluster.backend import LocalBackend

        return LocalBackend(self)


@ClusterConfig.register_subclass("ray")
@dataclass(frozen=True)
class RayCluster(ClusterConfig):
    """Workers in a Ray cluster, each with one training process."""

    address: str = setting(
        "auto", "HOST:PORT of the cluster; auto: the cluster on this machine; local: start a new one here"
    )
    auth: str = setting(
        "disabled",
        "value of RAY_AUTH_MODE; token requires RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
        choices=("disabled", "token"),
    )
    workers: int | None = setting(
        None, "number of training processes, each with its own resources", low=1, high=LARGEST
    )
    cpus_per_worker: float = setting(1.0, "CPUs that Ray reserves for each worker", above=0)
    gpus_per_worker: int = setting(0, "number of GPUs per worker", low=0, high=LARGEST)
    accelerator: str | None = setting(None, "TPU slice type, such as v4-32; an alternative to workers")
    slices: int = setting(1, "number of TPU slices", low=1, high=LARGEST)
    start_timeout: int = setting(
        1800, "seconds to wait for nodes, which may need to be provisioned first", low=1, high=LARGEST
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address not in ("auto", "local") and not re.fullmatch(r"[\w.\-\[\]:]+:\d{1,5}", self.address):
            raise InputError(
                f"address is {self.address!r}; it must be auto, local or HOST:PORT, and the launcher must run "
                "on a machine in the cluster"
            )
        if (self.workers is None) == (self.accelerator is None):
            raise InputError(
                "specify either workers (the number of processes) or accelerator (a TPU slice such as v4-32)"
            )
        if self.accelerator is None and self.slices > 1:
            raise InputError(f"slices is {self.slices}, but accelerator is missing; specify a TPU slice such as v4-32")
        if self.accelerator is not None and self.gpus_per_worker:
            raise InputError(
                f"gpus_per_worker is {self.gpus_per_worker}, but accelerator {self.accelerator} is a TPU; omit one"
            )
        if self.accelerator is not None:
            tpu_shape(self.accelerator)

    @property
    def shape(self) -> TpuShape | None:
        """The shape of one slice."""
        return None if self.accelerator is None else tpu_shape(self.accelerator)

    @property
    def num_processes(self) -> int:
        return self.slices * self.shape.hosts if self.shape else self.workers or 0

    @property
    def num_devices(self) -> int | None:
        return self.slices * self.shape.chips if self.shape else self.num_processes * self.gpus_per_worker or None

    def check_secrets(self) -> None:
        problems = Problems()
        with problems:
            super().check_secrets()
        # If Ray starts a new cluster on this machine, it generates the token itself.
        if self.auth == "token" and self.address != "local" and not os.environ.get("RAY_AUTH_TOKEN"):
            file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
            with problems:
                if not file.expanduser().is_file():
                    raise InputError(
                        f"auth is 'token', but RAY_AUTH_TOKEN is not set and {file} was not found; set "
                        "RAY_AUTH_TOKEN, or set RAY_AUTH_TOKEN_PATH to the path of the token file"
                    )
        problems.report()

    def build(self, job: Job) -> Backend:
        from sophia_levanter.cluster.ray import RayBackend

        return RayBackend(self)


@ClusterConfig.register_subclass("slurm")
@dataclass(frozen=True)
class SlurmCluster(ClusterConfig):
    """A Slurm job with one training process per node, which uses all of the node's GPUs."""

    nodes: int = setting(1, "number of nodes", low=1, high=LARGEST)
    gpus_per_node: int = setting(0, "number of GPUs per node", low=0, high=LARGEST)
    cpus_per_node: int | None = setting(None, "number of CPUs per node; null: all CPUs", low=1, high=LARGEST)
    partition: str | None = setting(None, "Slurm partition for the job")
    account: str | None = setting(None, "Slurm account to charge")
    time: str | None = setting(
        None, "time limit of each job, such as 12:00:00; a job that reaches it saves and is requeued"
    )
    save_before: int = setting(180, "save the run this many seconds before the time limit", low=1, high=LARGEST)
    options: tuple[str, ...] = setting((), "additional sbatch options, such as --qos=high")
    setup: tuple[str, ...] = setting((), "shell commands to run before training, such as source venv/bin/activate")
    python: str = setting("python", "Python interpreter, looked up after setup")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_before < self.stop_timeout + 30:
            raise InputError(
                f"save_before is {self.save_before}; it must be at least stop_timeout {self.stop_timeout} + 30, so "
                "that the save finishes before the time limit"
            )
        for name in ("partition", "account", "time"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                raise InputError(f"{name} is {value!r}; it must be a single word")
        for option in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", option):
                raise InputError(f"options contains {option!r}; it must be an sbatch option such as --qos=high")
        if any("\n" in line for line in self.setup):
            raise InputError("setup contains an item with a line break; use one item per line")

    @property
    def num_devices(self) -> int | None:
        return self.nodes * self.gpus_per_node or None

    def check_secrets(self) -> None:
        # Outside the job, `setup` has not run yet and may still set the secrets.
        if "SLURM_JOB_ID" in os.environ or not self.setup:
            super().check_secrets()

    def build(self, job: Job) -> Backend:
        from sophia_levanter.cluster.slurm import SlurmBackend

        return SlurmBackend(self)

    def submission(self, job: Job, launcher: Sequence[str]) -> Submission | None:
        from sophia_levanter.cluster.slurm.job import describe_submission, submit

        if "SLURM_JOB_ID" in os.environ:
            return None  # already running in the job, on its first node
        words = [self.python, *launcher]
        return Submission(partial(describe_submission, self, job, words), partial(submit, self, job, words))


@ClusterConfig.register_subclass("gcloud")
@dataclass(frozen=True)
class GcloudCluster(ClusterConfig):
    """Google Cloud TPU slices, requested as one queued resource per run, with hosts accessed through ssh."""

    shares_disk: ClassVar[bool] = False

    name: str | None = setting(None, "name of the queued resource; derived from the run directory if unset")
    project: str | None = setting(None, "Google Cloud project; defaults to gcloud's default project")
    zone: str | None = setting(None, "zone, such as us-central2-b")
    accelerator: str | None = setting(None, "TPU slice type, such as v4-32")
    slices: int = setting(1, "number of TPU slices", low=1, high=LARGEST)
    runtime_version: str | None = setting(None, "TPU software version; defaults to the version for the accelerator")
    capacity: str = setting("on-demand", "how the slices are provisioned", choices=("on-demand", "spot", "reserved"))
    network: str | None = setting(None, "network for the hosts")
    subnetwork: str | None = setting(None, "subnetwork for the hosts")
    internal_ips: bool = setting(False, "do not assign public IP addresses; ssh then tunnels through IAP")
    service_account: str | None = setting(
        None, "service account for the hosts; must be able to write to trainer.checkpoint_dir"
    )
    files: tuple[str, ...] = setting((), "local files to copy to the hosts' home directories, such as a wheel")
    setup: tuple[str, ...] = setting((), "shell commands to run once on every host after copying, such as pip install")
    python: str = setting("python3", "Python interpreter on the hosts")
    keep: bool = setting(False, "keep the slices running (and billed) after the run is done")
    start_timeout: int = setting(24 * 3600, "seconds to wait for capacity", low=1, high=LARGEST)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.accelerator:
            raise InputError("accelerator is missing; specify a TPU slice such as v4-32")
        tpu_shape(self.accelerator)
        if self.zone is None:
            raise InputError("zone is missing; specify a zone such as us-central2-b")
        if self.name is not None and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise InputError(
                f"name is {self.name!r}; it must be at most 40 characters from a-z, 0-9 and -, starting with a letter"
            )
        if any("\n" in line for line in self.setup):
            raise InputError("setup contains an item with a line break; use one item per line")

    def check_files(self) -> None:
        missing = [file for file in self.files if not Path(file).is_file()]
        if missing:
            raise InputError(
                f"files: {', '.join(missing)} not found; paths are relative to the working directory, "
                "and `make wheel` builds this project's wheel"
            )

    def check_secrets(self) -> None:
        """Do nothing, because the hosts fetch the secrets from Secret Manager."""

    @property
    def shape(self) -> TpuShape:
        """The shape of one slice."""
        return tpu_shape(self.accelerator or "")

    @property
    def num_processes(self) -> int:
        return self.slices * self.shape.hosts

    @property
    def num_devices(self) -> int | None:
        return self.slices * self.shape.chips

    def build(self, job: Job) -> Backend:
        from sophia_levanter.cluster.gcloud import GcloudBackend

        return GcloudBackend(self, job.run_dir)


# Patterns that identify files for other programs, and the commands that read these files.
OTHER_TOOLS = {
    r"^apiVersion:": "kubectl apply -f",
    r"^cluster_name:": "ray up",
    r"^FROM ": "docker build -f",
}


def read_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file, which contains `backend: NAME` and the fields of that backend.

    Raises:
        InputError: if the file is for another program or is not YAML, a key is unknown, or a value has the wrong type
            or is out of range.
    """
    try:
        return build(ClusterConfig, read_layers(path))
    except InputError as error:
        _check_reader(path)
        is_named = str(error).startswith((f"{path}: ", f"{path} "))
        raise InputError(str(error) if is_named else f"{path}: {error}") from None


def _check_reader(path: Path) -> None:
    """Reject a file intended for another program."""
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return
    for mark, command in OTHER_TOOLS.items():
        if re.search(mark, text, re.MULTILINE):
            raise InputError(
                f"--cluster {path} is a file for `{command}`; a cluster file for the launcher sets `backend:`, "
                "as in infra/local.yaml"
            )
