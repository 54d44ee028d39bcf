"""Command lines for gcloud, and of shell on the hosts, for a run on TPU slices of Google Cloud."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia_levanter.cluster.config import GcloudCluster
from sophia_levanter.errors import InputError

_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
# A connection whose other end has silently gone ends after a minute.
_KEEPALIVE = ("--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oServerAliveCountMax=4")


def resource_name(cluster: GcloudCluster, run_dir: Path) -> str:
    """The queued resource's name: the one in the cluster's file, or one made of the run directory and its place.

    Raises:
        InputError: if there is neither.
    """
    if cluster.name is not None:
        return cluster.name
    made = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).lstrip("-0123456789")[:33].rstrip("-")
    if not made:
        raise InputError(f"name is missing, and none can be made of {run_dir.name!r}; give the queued resource a name")
    # Two runs must not take each other's slices because their directories have the same name.
    return f"{made}-{hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:6]}"


@dataclass(frozen=True)
class GcloudWords:
    """Command lines for one queued resource, its nodes, one a slice, and their workers.

    Attributes:
        cluster: what is asked for.
        name: the queued resource's.
    """

    cluster: GcloudCluster
    name: str

    @property
    def node_names(self) -> list[str]:
        """Of the slices."""
        return [self.name] if self.cluster.slices == 1 else [f"{self.name}-{i}" for i in range(self.cluster.slices)]

    @property
    def config_file(self) -> str:
        """Where the run's configuration lies on the hosts; what is relative is so to the home folder."""
        return f"sophia_levanter-{self.name}.yaml"

    @property
    def log_folder(self) -> str:
        """Where each host keeps what its attempts have printed."""
        return f"sophia_levanter-{self.name}-logs"

    def create(self) -> list[str]:
        cluster, shape = self.cluster, self.cluster.shape
        one = [f"--node-id={self.name}"]
        several = [f"--node-count={cluster.slices}", f"--node-prefix={self.name}"]
        words = [
            *(*_QUEUED, "create", self.name),
            *(one if cluster.slices == 1 else several),
            f"--accelerator-type={shape.accelerator_type}",
            f"--runtime-version={cluster.runtime_version or shape.runtime_version}",
        ]
        if cluster.capacity != "on-demand":
            words.append(f"--{cluster.capacity}")
        for flag in ("network", "subnetwork", "service_account"):
            if value := getattr(cluster, flag):
                words.append(f"--{flag.replace('_', '-')}={value}")
        if cluster.internal_ips:
            words.append("--internal-ips")
        return [*words, *self._place, "--async", "--quiet"]

    def describe(self) -> list[str]:
        return [*_QUEUED, "describe", self.name, *self._place, "--format=json", "--quiet"]

    def list_all(self) -> list[str]:
        """All queued resources of the zone."""
        return [*_QUEUED, "list", *self._place]

    def delete(self) -> list[str]:
        # --force: the nodes go too.
        return [*_QUEUED, "delete", self.name, *self._place, "--force", "--async", "--quiet"]

    def describe_node(self, node: str) -> list[str]:
        return [*self._tpu_vm, "describe", node, *self._place, "--format=json", "--quiet"]

    def ssh(self, node: str, worker: int | str, command: str) -> list[str]:
        """Runs a line of shell on a worker, or on `all`; of a single one it passes standard input and the status on."""
        to = [node, *self._place, f"--worker={worker}", *self._tunnel, *_KEEPALIVE, "--quiet"]
        return [*self._tpu_vm, "ssh", *to, f"--command={command}"]

    def scp(self, node: str, files: Sequence[str], destination: str) -> list[str]:
        """Copies files to all workers."""
        to = [f"{node}:{destination}", *self._place, "--worker=all", *self._tunnel, "--quiet"]
        return [*self._tpu_vm, "scp", *files, *to]

    def setup(self) -> str:
        """The lines of the cluster's file, for a host that they have not yet been run on."""
        lines = "\n".join(self.cluster.setup)
        digest = hashlib.sha256(lines.encode())
        for path in map(Path, self.cluster.files):
            digest.update(path.read_bytes() if path.is_file() else b"")
        marker = f"sophia_levanter-setup-{digest.hexdigest()[:12]}"
        return f"test -e {marker} || {{ bash -e -o pipefail -c {shlex.quote(lines)} && touch {marker}; }}"

    def training(self, words: Sequence[str], env: Mapping[str, str], log: str) -> str:
        """Runs a training process on a host.

        Args:
            words: its command line.
            env: environment variables on top of the cluster's.
            log: name of the file for what it prints; an attempt's own.
        """
        cluster = self.cluster
        of_project = f" --project={cluster.project}" if cluster.project else ""
        # Two commands for each secret: the status of `export NAME="$(...)"` would be export's.
        parts = [
            f'{name}="$(gcloud secrets versions access latest --secret={name}{of_project})" || exit 1; export {name}'
            for name in cluster.secrets
        ]
        parts += [f"export {name}={shlex.quote(value)}" for name, value in {**cluster.env, **env}.items()]
        host = [cluster.python, "-m", "sophia_levanter.cluster.host", "--grace", str(cluster.stop_timeout)]
        host += ["--log", f"{self.log_folder}/{log}", "--", *words]
        return "; ".join([*parts, f"exec {shlex.join(host)}"])

    def newest_log(self) -> str:
        """Shows what the newest attempt prints on a host, and goes on doing so."""
        return f'tail -n 100 -F "$(ls -d {self.log_folder}/*.log | tail -n 1)"'

    @property
    def _place(self) -> list[str]:
        project = [f"--project={self.cluster.project}"] if self.cluster.project else []
        return [f"--zone={self.cluster.zone}", *project]

    @property
    def _tpu_vm(self) -> list[str]:
        # Only the alpha command knows of tunnels.
        return ["gcloud", *(["alpha"] if self.cluster.internal_ips else []), "compute", "tpus", "tpu-vm"]

    @property
    def _tunnel(self) -> list[str]:
        return ["--tunnel-through-iap"] if self.cluster.internal_ips else []
