"""`python -m sophia_levanter.commands.compare --config STUDY`: train the runs of a study and report the results."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.arguments import parse_arguments
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.files import Layer, Setting
from sophia_levanter.errors import InputError, counted, one_line
from sophia_levanter.files import lock
from sophia_levanter.run.directory import with_absolute_paths
from sophia_levanter.status import DONE, FAILURE, PREEMPTED, run_command
from sophia_levanter.studies.records import find, flat_config, read_records, write_records
from sophia_levanter.studies.study import PlannedRun, Study, plan, read_study
from sophia_levanter.training.stopping import StopRequest

Texts = dict[DataConfig, dict[str, str]]
RECORDS = "study.json"
STUDY_STOPS = "stop requested; the study will stop once the current run has saved; press Ctrl-C to stop immediately"
USAGE = """\
usage: python -m sophia_levanter.commands.compare --config STUDY [--out DIR] [--ray] [--plan]
       [--SECTION.FIELD VALUE ...] [--help]

Train the runs in a study that are not done yet, and write the results: study.json, report.md and plots. The command can
be interrupted at any time; run it again to continue.

  --config STUDY         YAML file with arms and their config files, settings and grids; see docs/studies.md
  --out DIR              output directory (default: studies/NAME, named after the study's file)
  --ray                  train each run as a Ray task on one core, instead of one run after another on all cores
  --plan                 print which runs are done and which are not, and exit
  --SECTION.FIELD VALUE  override a field in every run of the study: --data.train 'novels/*.txt'
  --help                 show this help message and exit"""


@dataclass(frozen=True)
class Command:
    """The parsed command line."""

    study: Path
    out: Path
    ray: bool
    plan_only: bool
    overrides: Layer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 if a run failed, 2 on bad input, 75 on SIGTERM, or 130 on Ctrl-C."""
    interruption = Interruption()
    try:
        return run_command(argv, lambda words: _run(words, interruption), usage=USAGE)
    finally:
        interruption.restore_handlers()


def _run(words: Sequence[str], interruption: Interruption) -> int:
    try:
        return _compare(parse(words), interruption)
    except KeyboardInterrupt:
        number = interruption.signal
        if number is None or number == signal.SIGINT:
            raise
        with suppress(OSError):  # after SIGHUP, the terminal is gone
            print(f"{number.name}: stopped; run the same command again to continue", file=sys.stderr)
        return PREEMPTED


class Interruption:
    """Ends a study when a signal is received: immediately or, during a run, once the run has been saved.

    Attributes:
        signal: the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        # SIGHUP is handled so that closing the terminal does not leave a run behind. Signals that are already ignored
        # stay ignored: nohup ignores SIGHUP, and shells ignore SIGINT in background commands.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {n: handler for n in numbers if (handler := signal.getsignal(n)) != signal.SIG_IGN}
        self._end_at_once()

    def _end_at_once(self) -> None:
        for number in self._before:
            signal.signal(number, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # Do not raise SystemExit: while waiting, Ray would replace it with a SystemExit that has a different status.
        raise KeyboardInterrupt

    @contextmanager
    def noted(self) -> Iterator[Callable[[], None]]:
        """Record signals while runs are trained. Yield a function that raises KeyboardInterrupt after a signal."""
        stop = StopRequest(STUDY_STOPS, self._before, interruptible=True)
        # Keep an earlier signal, because Python may have discarded its exception. See `StopRequest.check`.
        stop.signal = stop.signal or self.signal
        try:
            yield stop.check
            stop.check()
        finally:
            self.signal = stop.signal
            self._end_at_once()

    def restore_handlers(self) -> None:
        """Restore the caller's signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def parse(words: Sequence[str]) -> Command:
    """Parse the command line.

    Raises:
        InputError: if an argument is unknown or its value is missing.
    """
    arguments = parse_arguments(words, options=("--config", "--out"), flags=("--ray", "--plan"), overrides=True)
    study = Path(arguments.needed("--config", "STUDY", "for example, --config config/studies/quick.yaml"))
    out = Path(arguments.options.get("--out", Path("studies") / study.stem))
    overrides = {name: Setting(value) for name, value in arguments.overrides}
    return Command(study, out, "--ray" in arguments.flags, "--plan" in arguments.flags, overrides)


def _compare(command: Command, interruption: Interruption) -> int:
    study = read_study(command.study)
    if any(path.is_file() for path in (command.out, *command.out.parents)):
        raise InputError(f"--out {command.out} is a file or inside a file; specify a directory")
    comparison = _Comparison(study, command.overrides, command.out)
    if command.plan_only:
        comparison.print_plan()
        return DONE
    with _alone_in(command.out):
        comparison.update()
        comparison.check_texts()
        with interruption.noted() as check_stop:
            failures = comparison.do_all_runs(command.ray, check_stop)

        from sophia_levanter.studies.report import REPORT, write_report

        print(write_report(study, comparison.runs, comparison.records, command.out))
        if (command.out / REPORT).is_file():
            print(f"report: {command.out / REPORT}")
    return FAILURE if failures else DONE


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Lock the directory, because concurrent comparisons would overwrite each other's records."""
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out / ".lock")
    if held is None:
        raise InputError(f"--out {out} is in use by another comparison; wait for it or choose another directory")
    with held:
        yield


class _Comparison:
    """A study with its planned runs, its output directory and the records of completed runs."""

    def __init__(self, study: Study, overrides: Layer, out: Path) -> None:
        self.study, self.overrides, self.out = study, overrides, out
        self.texts: Texts = {}
        self.update()

    def update(self) -> None:
        """Read the records and plan the runs. Coordinate descent plans the next ones from the records."""
        self.records = read_records(self.out / RECORDS)
        runs = plan(self.study, self.overrides, self._loss_of)
        self.runs = [replace(run, config=with_absolute_paths(run.config)) for run in runs]

    def _loss_of(self, config: TrainConfig) -> float | None:
        record = find(self.records, with_absolute_paths(config))
        return None if record is None else math.inf if record.loss is None else record.loss

    def missing(self) -> dict[str, TrainConfig]:
        """Return each configuration without a record, keyed by the description of the first run that uses it."""
        missing: dict[str, TrainConfig] = {}
        for run in self.runs:
            if find(self.records, run.config) is None and run.config not in missing.values():
                missing[describe(run)] = run.config
        return missing

    def print_counts(self) -> None:
        missing = len(self.missing())
        more = "; the search may add runs" if missing and any(arm.search_runs for arm in self.study.arms) else ""
        print(f"{self.study.name}: {counted(len(self.runs), 'run')}, {missing} to do{more}", flush=True)

    def print_plan(self) -> None:
        self.print_counts()
        for run in self.runs:
            state = "done" if find(self.records, run.config) else "to do"
            print(one_line(f"{state:6} {describe(run)}"))

    def check_texts(self) -> None:
        """Compute the digests of the data used by the runs, and compare them with those in the records.

        Raises:
            InputError: if data is missing or differs from the data in a record. Paths may change, but contents may not,
                because the runs of a study are compared with each other.
        """
        from sophia_levanter.studies.runner import digests

        for data in dict.fromkeys(run.config.data for run in self.runs):
            if data not in self.texts:
                self.texts[data] = digests(data)
        same: dict[str, PlannedRun] = {}
        for run in self.runs:
            first = same.setdefault(json.dumps(flat_config(run.config)), run)
            if self.texts[first.config.data] != self.texts[run.config.data]:
                raise InputError(
                    f"{describe(first)} and {describe(run)} differ only in their text, so their records could not be "
                    "told apart; give each text a study with its own --out"
                )
            record = find(self.records, run.config)
            for name, then in (record.facts.get("texts", {}) if record else {}).items():
                now = self.texts[run.config.data][name]
                if then != now:
                    raise InputError(
                        f"{self.out / RECORDS} contains runs on different text: the digest of data.{name} was "
                        f"{then} and is now {now}; choose another --out"
                    )

    def do_all_runs(self, ray: bool, check_stop: Callable[[], None]) -> int:
        """Train the missing runs and those that coordinate descent plans from their results. Return the failures."""
        tried: set[str] = set()
        failures = 0
        while True:
            self.print_counts()
            failures += self.do_runs(
                {name: c for name, c in self.missing().items() if name not in tried}, ray, check_stop
            )
            tried |= self.missing().keys()
            self.update()
            if self.missing().keys() <= tried:
                return failures
            self.check_texts()

    def do_runs(self, missing: dict[str, TrainConfig], ray: bool, check_stop: Callable[[], None]) -> int:
        """Train these runs, and write each record as soon as it is available. Return the number of failures."""
        # Import slow modules after the checks, so that mistakes are reported immediately.
        from sophia_levanter.studies import runner

        folder = (self.out / "runs").absolute()
        names = list(missing)
        configs = [run.config for run in self.runs]
        jobs = runner.jobs_of(configs, list(missing.values()), folder, partial(print, flush=True)) if missing else []
        directories, left = [runner.job_directory(folder, config) for config in configs], dict(enumerate(jobs))
        runner.remove_checkpoints(directories, jobs)  # may be left over from a study that was killed
        if not jobs:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        failures = 0
        with closing(runner.as_ray_tasks(jobs, check_stop) if ray else runner.one_by_one(jobs, check_stop)) as results:
            for count, (index, result) in enumerate(results, start=1):
                if isinstance(result, runner.RunFailed):
                    print(one_line(f"error: {result}"), file=sys.stderr)
                    failures += 1
                    continue
                facts = result.facts | {"texts": self.texts[jobs[index].config.data]}
                self.records.append(replace(result, facts=facts))
                write_records(self.out / RECORDS, self.study.name, self.records)
                del left[index]
                runner.remove_checkpoints(directories, left.values())
                outcome = "diverged" if result.loss is None else f"validation loss {result.loss:.4f}"
                print(one_line(f"{count}/{len(jobs)} {names[index]}: {outcome}"), flush=True)
        return failures


def describe(run: PlannedRun) -> str:
    """Describe a run by its arm, grid point, length and seed."""
    point = [f"{name}={value}" for name, value in run.point.items()]
    return " ".join([run.arm, *point, f"tokens={run.tokens}", f"seed={run.seed}"])


if __name__ == "__main__":
    sys.exit(main())
