"""Metrics as a run of Weights & Biases."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from sophia_levanter.config.registries import STATISTICS
from sophia_levanter.config.run import TrackingConfig

Say = Callable[[str], None]

# Seconds to look for the server at the start, and to upload what is left at the end.
INIT_SECONDS = 20
FINISH_SECONDS = 60


class Wandb:
    """A run there that goes on where one with its id left off; offline where the server cannot be reached.

    wandb's own steps only go up, and a run that goes back to a checkpoint does not: the metrics' x axis is `step`, a
    metric of our own, and steps done twice are there twice.

    Args:
        config: mode, project and names; without a name the directory's is taken.
        directory: of the run; wandb's files go into `wandb` there.
        run_id: of the run, the same after every resume.
        facts: what wandb is to show as the run's configuration, nested.
        say: gets the line that says where the run is.
        warn: gets the line that says why it is offline.
    """

    def __init__(
        self, config: TrackingConfig, directory: Path, run_id: str, facts: Mapping[str, Any], say: Say, warn: Say
    ) -> None:

        def start(mode: Any) -> wandb.Run:
            # Before a first line of wandb's own, and before it asks a terminal for a key.
            wandb.setup(wandb.Settings(silent=True, console="off"))
            return wandb.init(
                mode=mode,
                dir=directory,
                id=run_id,
                resume="allow",
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=config.wandb_name or directory.name,
                group=config.wandb_group,
                settings=wandb.Settings(
                    init_timeout=INIT_SECONDS,
                    finish_timeout=FINISH_SECONDS,
                    finish_timeout_raises=True,
                    # It would note the repository's URL, in which there may be a token; the commit is in the facts.
                    disable_git=True,
                ),
            )

        try:
            self._run = start(config.wandb)
        except Exception as error:
            if config.wandb == "offline":
                raise
            # wandb's service has the run's id in use still.
            wandb.teardown()
            self._run = start("offline")
            reason = " ".join(str(error).split()).rstrip(".")
            warn(f"WARNING: wandb: {reason}; the run is logged offline; upload it with: {self._upload}")
        else:
            say(f"wandb: {self._run.url}" if self._run.url else f"wandb: offline; to upload it: {self._upload}")
        self._run.config.update(dict(facts), allow_val_change=True)
        self._run.define_metric("*", step_metric="step")

    @property
    def _upload(self) -> str:
        return f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log({"step": step, **_with_histograms(metrics)})

    def close(self, *, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            raise TimeoutError(
                f"not everything was uploaded within {FINISH_SECONDS} s of the run's end; upload the rest "
                f"with: {self._upload}"
            ) from None
        finally:
            # What finish leaves to the end of the process: files are whole only now.
            wandb.teardown()


def _with_histograms(metrics: Mapping[str, float]) -> dict[str, Any]:
    """The metrics, with a histogram of each kind of statistic in place of its values for all arrays and layers."""
    found: dict[str, Any] = {}
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in metrics.items():
        if not name.startswith(f"{STATISTICS}/"):
            found[name] = value
        elif math.isfinite(value):
            kinds[f"{STATISTICS}/{name.rpartition('/')[2]}"].append(value)
    return found | {kind: wandb.Histogram(values) for kind, values in kinds.items()}
