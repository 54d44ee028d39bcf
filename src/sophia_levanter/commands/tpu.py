"""`python -m sophia_levanter.commands.tpu create|list|delete|ssh|logs --cluster FILE`: manage TPU slices manually."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sophia_levanter.cluster.config import GcloudCluster, read_cluster
from sophia_levanter.cluster.gcloud.commands import GcloudCommands, missing_gcloud, resource_name
from sophia_levanter.config.arguments import chosen, parse_arguments
from sophia_levanter.errors import InputError
from sophia_levanter.status import DONE, FAILURE, run_command

USAGE = """\
usage: python -m sophia_levanter.commands.tpu create --cluster FILE [NAME] [--dry_run]
       python -m sophia_levanter.commands.tpu list   --cluster FILE [--dry_run]
       python -m sophia_levanter.commands.tpu delete --cluster FILE [NAME] [--dry_run]
       python -m sophia_levanter.commands.tpu ssh    --cluster FILE [NAME] [--dry_run] -- COMMAND...
       python -m sophia_levanter.commands.tpu logs   --cluster FILE [NAME] [--dry_run]

  NAME            name of the queued resource, or the run directory; required unless the cluster file sets a name
  --cluster FILE  a cluster file with backend: gcloud
  create          request the slices without waiting for them; they are billed once they are active
  list            list the queued resources in the zone with their states
  delete          delete the queued resource and its slices
  ssh             run COMMAND on all workers of all slices; a single word is run as a shell command line, and several
                  words are passed on unchanged
  logs            follow the output of the newest attempt on worker 0 of the first slice, until Ctrl-C
  --dry_run       print the gcloud commands without running them
  --help          show this help message and exit"""
ACTIONS = ("create", "list", "delete", "ssh", "logs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 if gcloud or the command failed, 2 on bad input, or 130 on Ctrl-C."""
    given = sys.argv[1:] if argv is None else list(argv)
    own = given[: given.index("--")] if "--" in given else given
    # A --help after the `--` is an argument of COMMAND.
    return run_command(own, lambda words: _run(words, given[len(own) + 1 :]), usage=USAGE, interrupted="interrupted")


def _run(given: Sequence[str], command: Sequence[str]) -> int:
    what, rest = chosen(given, ACTIONS)
    arguments = parse_arguments(rest, options=("--cluster",), flags=("--dry_run",), words=True)
    cluster = _cluster(Path(arguments.needed("--cluster", "FILE", "the file specifies the slices and their zone")))
    if len(arguments.words) > (what != "list"):
        raise InputError(f"unexpected argument {arguments.words[-1]!r}; --help shows the options")
    if (what == "ssh") != bool(command):
        raise InputError(
            "ssh requires -- COMMAND... to run on the workers" if what == "ssh" else f"{what} does not take -- COMMAND"
        )
    lines = _lines(what, cluster, arguments.words, command)
    if "--dry_run" in arguments.flags:
        for line in lines:
            print(shlex.join(line))
        return DONE
    statuses = [_gcloud(line) for line in lines]  # run on all slices, even if the command fails on one
    return FAILURE if any(statuses) else DONE


def _cluster(path: Path) -> GcloudCluster:
    cluster = read_cluster(path)
    if not isinstance(cluster, GcloudCluster):
        raise InputError(f"{path}: backend is {cluster.backend}; tpu requires backend gcloud")
    return cluster


def _lines(what: str, cluster: GcloudCluster, given: Sequence[str], command: Sequence[str]) -> list[list[str]]:
    if what == "list":
        return [GcloudCommands(cluster, "").list_all()]
    gcloud = GcloudCommands(cluster, _name(cluster, given))
    if what == "create":
        return [gcloud.create()]
    if what == "delete":
        return [gcloud.delete()]
    if what == "logs":
        return [gcloud.ssh(gcloud.node_names[0], 0, gcloud.newest_log())]
    line = command[0] if len(command) == 1 else shlex.join(command)
    return [gcloud.ssh(node, "all", line) for node in gcloud.node_names]


def _name(cluster: GcloudCluster, given: Sequence[str]) -> str:
    if not given or Path(given[0]).is_dir():
        return resource_name(cluster, Path(*given))
    if cluster.name is not None and given[0] != cluster.name:
        raise InputError(f"{given[0]} differs from the name in the cluster file, {cluster.name}; omit one of them")
    return given[0]


def _gcloud(line: Sequence[str]) -> int:
    try:
        return subprocess.run(line, check=False).returncode
    except FileNotFoundError:
        raise InputError(missing_gcloud()) from None


if __name__ == "__main__":
    sys.exit(main())
