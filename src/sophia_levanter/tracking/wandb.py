"""Log metrics to a Weights & Biases run."""

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

# Seconds to wait for the server at the start, and for the remaining uploads at the end.
INIT_SECONDS = 20
FINISH_SECONDS = 60


class Wandb:
    """Logs to a new wandb run or the existing one with the same id. The run is offline if the server is unreachable.

    wandb's own step can only increase, but a run may roll back to a checkpoint. The x axis therefore uses a separate
    metric called `step`, and repeated steps appear twice.

    Args:
        config: the mode, the project and the names. By default, the wandb run is named after the run directory.
        directory: the run directory. wandb stores its files in the subfolder `wandb`.
        run_id: the run's id, which stays the same when the run resumes.
        facts: the configuration to show, as a nested mapping.
        say: prints where to find the wandb run.
        warn: prints why the run is offline.
    """

    def __init__(
        self, config: TrackingConfig, directory: Path, run_id: str, facts: Mapping[str, Any], say: Say, warn: Say
    ) -> None:

        def start(mode: Any) -> wandb.Run:
            # Call setup first, so that wandb prints nothing and does not prompt for an API key.
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
                    # wandb would save the repository's URL, which may contain a token; `facts` has the commit.
                    disable_git=True,
                ),
            )

        try:
            self._run = start(config.wandb)
        except Exception as error:
            if config.wandb == "offline":
                raise
            # Shut down wandb's service, which still holds the run's id.
            wandb.teardown()
            self._run = start("offline")
            reason = " ".join(str(error).split()).rstrip(".")
            warn(f"WARNING: wandb: {reason}; the run will be logged offline; upload it with: {self._upload}")
        else:
            say(f"wandb: {self._run.url}" if self._run.url else f"wandb: offline; upload it with: {self._upload}")
        self._run.config.update(dict(facts), allow_val_change=True)
        self._run.define_metric("*", step_metric="step")

    @property
    def _upload(self) -> str:
        return f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
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
            # The files are complete only after teardown, which wandb would otherwise perform when the process exits.
            wandb.teardown()


def _with_histograms(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Replace the array statistics in `metrics` with one histogram per kind, over all arrays and layers."""
    found: dict[str, Any] = {}
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in metrics.items():
        if not name.startswith(f"{STATISTICS}/"):
            found[name] = value
        elif math.isfinite(value):
            kinds[f"{STATISTICS}/{name.rpartition('/')[2]}"].append(value)
    return found | {kind: wandb.Histogram(values) for kind, values in kinds.items()}
