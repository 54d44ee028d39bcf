"""`python -m sophia_levanter.commands.launch --config FILE --cluster FILE`: start and supervise a run on many hosts."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia_levanter.cluster.backend import Job, Unavailable
from sophia_levanter.cluster.config import ClusterConfig, Submission, read_cluster
from sophia_levanter.cluster.record import LaunchRecord
from sophia_levanter.cluster.supervisor import Supervisor
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.arguments import chosen, parse_arguments, whole_number
from sophia_levanter.config.command_line import Command, dump_config, load_config
from sophia_levanter.config.run import check_mesh
from sophia_levanter.errors import InputError, Problems, one_line
from sophia_levanter.files import write_atomically
from sophia_levanter.run.directory import LAUNCH, choose_run_directory
from sophia_levanter.status import DONE, FAILURE, run_command

USAGE = """\
usage: python -m sophia_levanter.commands.launch --config FILE --cluster FILE [--dry_run] [--SECTION.FIELD VALUE ...]
       python -m sophia_levanter.commands.launch status RUN_DIR
       python -m sophia_levanter.commands.launch logs RUN_DIR [--process N] [--attempt N]
       python -m sophia_levanter.commands.launch stop RUN_DIR

Start one training process on each host in a cluster, and restart them from the last checkpoint when a host dies, hangs
or is preempted, until the run is done. Run the same command again to continue a stopped run.

  --config FILE          the run's configuration, as for training (default run directory: runs/NAME)
  --cluster FILE         cluster file that sets backend to local, ray, slurm or gcloud, such as those in infra/
  --dry_run              print what would be created, run and billed, and exit
  --SECTION.FIELD VALUE  override a field of the run: --trainer.checkpoint_dir gs://bucket/run
  status                 print the state of a launched run
  logs                   print the output of the last attempt or --attempt N, from all processes or only --process N
  stop                   ask the run to save and stop, and wait until it has
  --help                 show this help message and exit

Exit status: 0 done, 1 gave up, 2 bad input, 75 stopped (run the command again), 130 interrupted. Ctrl-C saves and stops
the run; a second Ctrl-C stops it immediately."""


@dataclass(frozen=True)
class Launch:
    """The launcher's parsed command line.

    Attributes:
        config: the run's configuration, including its run directory.
        cluster: the cluster to launch the run on.
        cluster_file: the file from which `cluster` was read.
        dry_run: whether to print what would be done without doing it.
    """

    config: TrainConfig
    cluster: ClusterConfig
    cluster_file: Path
    dry_run: bool

    @property
    def job(self) -> Job:
        """The job to pass to the cluster backend."""
        run_dir = Path(self.config.trainer.run_dir or "")
        return Job(run_dir, run_dir.absolute() / LAUNCH)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 after giving up, 2 on bad input, 75 if stopped, or 130 on Ctrl-C."""
    return run_command(argv, _run, usage=USAGE)


def _run(words: Sequence[str]) -> int:
    verbs = {"status": _status, "logs": _logs, "stop": _stop}
    if words and not words[0].startswith("-"):
        verb, rest = chosen(words, verbs)
        return verbs[verb](rest)
    return _launch(parse(words))


def parse(words: Sequence[str]) -> Launch:
    """Parse the launcher's command line.

    Raises:
        InputError: if an argument is unknown, a file is invalid, or the run directory contains another run.
    """
    arguments = parse_arguments(words, options=("--config", "--cluster"), flags=("--dry_run",), overrides=True)
    path = Path(arguments.needed("--config", "FILE", "for example, --config config/gpt2_large_sophia.yaml"))
    cluster_file = Path(arguments.needed("--cluster", "FILE", "for example, --cluster infra/local.yaml"))
    config = load_config(path, arguments.overrides)
    cluster = read_cluster(cluster_file)  # after `load_config`, which imports plug-ins that may register the backend
    _check_fit(config, cluster, dry_run="--dry_run" in arguments.flags)
    if config.trainer.run_dir is None:
        trainer = dataclasses.replace(config.trainer, run_dir=str(Path("runs", path.stem)))
        config = dataclasses.replace(config, trainer=trainer)
    if cluster.shares_disk:
        _, config = choose_run_directory(Command(config, path.stem, "auto"))
    return Launch(config, cluster, cluster_file, "--dry_run" in arguments.flags)


def _check_fit(config: TrainConfig, cluster: ClusterConfig, *, dry_run: bool) -> None:
    """Check, before anything is billed, that the run fits the cluster and that its files and secrets exist.

    In a dry run, missing secrets are only reported, because the printed commands do not depend on them.

    Raises:
        InputError: if there are problems; the message lists all of them.
    """
    problems = Problems()
    for name in ("coordinator", "num_processes", "process_id"):
        with problems:
            if (value := getattr(config.mesh, name)) is not None:
                raise InputError(f"mesh.{name} is {value!r}, but the launcher sets it; remove the setting")
    with problems:
        if cluster.num_devices is not None:
            check_mesh(config, cluster.num_devices)
    with problems:
        cluster.check_files()
    with problems:
        try:
            cluster.check_secrets()
        except InputError as error:
            if not dry_run:
                raise
            print(one_line(f"warning: {error}"), file=sys.stderr)
    run_dir, checkpoint_dir = config.trainer.run_dir, config.trainer.checkpoint_dir
    with problems:
        if "://" in (run_dir or ""):
            raise InputError(
                f"trainer.run_dir {run_dir} is a URL; specify a directory (only trainer.checkpoint_dir may be a URL)"
            )
    with problems:
        if not cluster.shares_disk and "://" not in (checkpoint_dir := checkpoint_dir or "null"):
            raise InputError(
                f"trainer.checkpoint_dir is {checkpoint_dir}, but TPU hosts do not share a disk, and their disks are "
                "deleted with them; specify a bucket: --trainer.checkpoint_dir gs://BUCKET/RUN"
            )
    problems.report()


def _launch(launch: Launch) -> int:
    words = ["-u", "-m", "sophia_levanter.commands.launch", "--config", str(launch.job.config_file)]
    submission = launch.cluster.submission(launch.job, [*words, "--cluster", str(launch.cluster_file.absolute())])
    if submission is not None:
        return _submit(launch, submission)
    backend = launch.cluster.build(launch.job)
    if launch.dry_run:
        return _print(backend.describe(launch.job))
    record = LaunchRecord(launch.job.directory)
    with record.held():
        write_atomically(launch.job.config_file, dump_config(launch.config).encode())
        return Supervisor(backend, launch.job, launch.cluster, record, _say).run()


def _submit(launch: Launch, submission: Submission) -> int:
    """Submit the job, and wait for it to end. The first node of the job runs its own launcher."""
    from sophia_levanter.cluster.slurm.job import active_job

    job = launch.job
    if launch.dry_run:
        return _print(submission.describe())
    if found := active_job(job.directory):
        raise InputError(f"Slurm job {found[0]} is {found[1]}; run launch stop {job.run_dir} first")
    with LaunchRecord(job.directory).held():
        write_atomically(job.config_file, dump_config(launch.config).encode())
    return submission.submit(_say)


def _print(lines: Sequence[str]) -> int:
    for line in lines:
        print(line)
    return DONE


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:
        # The reader has exited or the disk is full. The run continues, and its log files stay complete.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _status(words: Sequence[str]) -> int:
    record, _ = _record(words)
    return _show(record)


def _show(record: LaunchRecord) -> int:
    from sophia_levanter.cluster.slurm.job import active_job

    if not record.is_held and (job := active_job(record.directory)):
        print(f"Slurm job {job[0]} is {job[1]}; the launcher starts with it")
        return DONE
    status = record.read()
    print(one_line(status))
    if status.exit_status is None and not record.is_held:
        print("the launcher has died, so the run has stopped; run the same launch command again to continue")
        return FAILURE
    return DONE


def _logs(words: Sequence[str]) -> int:
    record, options = _record(words, "--process", "--attempt")
    attempts = record.attempts()
    if "--attempt" in options:
        wanted = record.attempt_directory(whole_number("--attempt", options["--attempt"]))
        if wanted not in attempts:
            there = ", ".join(path.name for path in attempts) or "none"
            raise InputError(f"--attempt {options['--attempt']} has no logs; attempts with logs: {there}")
        attempts = [wanted]
    logs = sorted(attempts[-1].glob("*.log")) if attempts else []
    if "--process" in options:
        name = f"process-{whole_number('--process', options['--process'])}"
        if name not in [log.stem for log in logs]:
            there = ", ".join(log.stem for log in logs) or "none"
            raise InputError(f"--process {options['--process']} has no logs; processes with logs: {there}")
        logs = [log for log in logs if log.stem == name]
    for log in logs:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(f"{log.stem} | {line}", end="")
    return DONE


def _stop(words: Sequence[str]) -> int:
    from sophia_levanter.cluster.slurm import ask
    from sophia_levanter.cluster.slurm.job import active_job

    record, _ = _record(words)
    if not record.is_held:
        if job := active_job(record.directory):
            try:
                ask("scancel", job[0])
            except Unavailable as error:
                print(one_line(f"error: {error}"), file=sys.stderr)
                return FAILURE
            print(f"cancelled Slurm job {job[0]} before it started")
        else:
            print("nothing is running", flush=True)
            _show(record)
        return DONE
    record.ask_to_stop()
    print("asked the run to save and stop", flush=True)
    while record.is_held:
        time.sleep(0.5)
    _show(record)
    return DONE


def _record(words: Sequence[str], *options: str) -> tuple[LaunchRecord, dict[str, str]]:
    arguments = parse_arguments(words, options=options, words=True)
    if len(arguments.words) != 1:
        raise InputError("expected one run directory, as in: launch status RUN_DIR")
    run_dir = Path(arguments.words[0])
    if not (run_dir / LAUNCH).is_dir():
        raise InputError(f"{run_dir} contains no launched run")
    return LaunchRecord(run_dir / LAUNCH), arguments.options


if __name__ == "__main__":
    sys.exit(main())
