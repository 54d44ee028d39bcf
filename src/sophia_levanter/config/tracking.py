"""Where the numbers of a run go besides its directory. Free of jax."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError

# Of a project's name, as wandb has it.
_NOT_IN_A_PROJECT = "/\\#?%:"
_LONGEST_NAME = 128


@dataclass(frozen=True)
class TrackingConfig(Settings):
    """Where the numbers go besides metrics.jsonl, which is always written.

    Raises:
        InputError: if a value is not what it must be.
    """

    section: ClassVar[str] = "tracking"

    wandb: str | None = setting(
        None,
        "log to Weights & Biases: online, or offline into RUN_DIR/wandb for a later `wandb sync`",
        choices=("online", "offline"),
    )
    wandb_project: str = setting("sophia_levanter", "project of the run")
    wandb_entity: str | None = setting(None, "user or team of the project; the account's default if null")
    wandb_name: str | None = setting(None, "name of the run; the run directory's if null")
    wandb_group: str | None = setting(None, "group of runs to show it in")
    tensorboard: bool = setting(False, "write event files into RUN_DIR/tensorboard")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("wandb_project", "wandb_entity", "wandb_name", "wandb_group"):
            value = getattr(self, name)
            if value is not None and not 0 < len(value.strip()) <= len(value) <= _LONGEST_NAME:
                raise InputError(f"tracking.{name} is {value!r}; it must have 1 to {_LONGEST_NAME} characters")
        if found := [char for char in self.wandb_project if char in _NOT_IN_A_PROJECT]:
            raise InputError(
                f"tracking.wandb_project is {self.wandb_project!r}; a project's name has no {found[0]!r} in it"
            )


def check_installed(config: TrackingConfig) -> None:
    """Whether the packages are there that the configuration needs.

    Raises:
        InputError: if one is not.
    """
    if config.wandb is not None:
        _check_package("wandb", f"tracking.wandb is {config.wandb!r}", "wandb")
    if config.tensorboard:
        _check_package("tensorboardX", "tracking.tensorboard is true", "tensorboard")


def _check_package(package: str, setting: str, extra: str) -> None:
    spec = find_spec(package)
    # A folder of that name, which wandb leaves where it runs, is found too, and has no origin.
    if spec is None or spec.origin is None:
        raise InputError(f"{setting}; {package} is not installed; pip install 'sophia-levanter[{extra}]'")
