"""`python -m sophia_levanter.commands.plan --config FILE`: estimate a run's cost before paying for machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia_levanter.accelerators import GPUS, TPUS
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.arguments import parse_arguments, whole_number
from sophia_levanter.config.command_line import load_config
from sophia_levanter.errors import InputError, one_line
from sophia_levanter.planning.target import Target, pretended_target, tpu_target
from sophia_levanter.status import DONE, FAILURE, run_command

OPTIONS = ("--config", "--target", "--devices", "--gpu", "--mfu")
USAGE = f"""\
usage: python -m sophia_levanter.commands.plan --config FILE [--target TPU | --devices N [--gpu KIND]] [--mfu SHARE]
       [--SECTION.FIELD VALUE ...] [--help]

Compile a run's steps without data or parameter values. Print the number of parameters, FLOPs, memory per device by
kind, traffic between devices, the largest microbatch that fits, the time that the run would take, and the bottleneck of
a step.

  --config FILE          the run's configuration, as for training
  --target TPU           a TPU slice such as v4-32, several slices such as 2xv4-32, or a topology such as v4:2x2x4
                         ({", ".join(TPUS)}); uses the real TPU compiler, which requires only
                         pip install 'sophia-levanter[tpu]', not a TPU
  --devices N            number of GPUs (default: 1); compiles for this machine's CPU, so numbers are approximate
  --gpu KIND             one of {", ".join(GPUS)} (default: h100)
  --mfu SHARE            expected model FLOPs utilization (default: 0.4)
  --SECTION.FIELD VALUE  override a field in the file: --mesh.fsdp embed
  --help                 show this help message and exit"""


@dataclass(frozen=True)
class Command:
    """The parsed command line."""

    config: TrainConfig
    name: str
    target: Target
    mfu: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 if the compiler failed, 2 on bad input, or 130 on Ctrl-C."""
    return run_command(argv, lambda words: _plan(parse(words)), usage=USAGE)


def parse(words: Sequence[str]) -> Command:
    """Parse the command line.

    Raises:
        InputError: if an argument is unknown, a value is missing or invalid, or the configuration is invalid.
    """
    arguments = parse_arguments(words, options=OPTIONS, overrides=True)
    path = Path(arguments.needed("--config", "FILE", "for example, --config config/gpt2_large_sophia.yaml"))
    options = arguments.options
    config = load_config(path, arguments.overrides)
    return Command(config, path.stem, _target(options), _mfu(options.get("--mfu", "0.4")))


def _target(options: dict[str, str]) -> Target:
    if "--target" in options:
        for other in ("--devices", "--gpu"):
            if other in options:
                raise InputError(f"{other} cannot be combined with --target, which sets the number and kind of devices")
        return tpu_target(options["--target"])
    count = whole_number("--devices", options.get("--devices", "1"))
    return pretended_target(count, options.get("--gpu", "h100"))


def _mfu(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"--mfu is {text!r}; it must be above 0 and at most 1")
    return share


def _plan(command: Command) -> int:
    # jax reads this variable when it starts. Planning must not use or even query this machine's accelerators.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from jax.errors import JaxRuntimeError

    from sophia_levanter.planning.run_plan import describe

    try:
        for line in describe(command.config, command.name, command.target, command.mfu):
            print(line, flush=True)
    except JaxRuntimeError as error:
        print(one_line(f"error: {str(error).splitlines()[0]}"), file=sys.stderr)
        return FAILURE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
