"""Environment settings that affect a run's results. They are fixed where jax allows it and recorded otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import sophia_levanter
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import dump_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.errors import InputError

# Settings that JAX_* environment variables can change, and the values that every run uses.
FIXED = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
# Environment variables that users may set deliberately and that change at least the low-order bits of the results.
# Unset variables are not recorded, so that runs saved before a variable was added to this list still compare equal.
RECORDED = (
    "LIBTPU_INIT_ARGS",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_SOFTMAX_CUSTOM_JVP",
    "NVIDIA_TF32_OVERRIDE",
    "NPY_DISABLE_CPU_FEATURES",
)


@contextmanager
def fixed_settings() -> Iterator[None]:
    """Set jax's settings to the values in `FIXED` in all threads, and restore the previous values on exit.

    Raises:
        InputError: if compilation is disabled.
    """
    if jax.config.values["jax_disable_jit"]:
        raise InputError("JAX_DISABLE_JIT is set, but a run compiles its steps ahead of time; unset it")
    before = {name: jax.config.values[name] for name in FIXED}
    for name, value in FIXED.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def recorded_environment() -> dict[str, str | int | None]:
    """Return the versions, thread count and environment variables to save with a run and compare when it resumes."""
    return {
        "jax": version("jax"),
        "cpu_threads": _cpu_threads(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    } | {name: os.environ[name] for name in RECORDED if os.environ.get(name)}


def _cpu_threads() -> int | None:
    """Return the number of threads that XLA uses: the value of NPROC if it is set, otherwise one thread per core."""
    if os.environ.get("NPROC", "").isdecimal():
        return int(os.environ["NPROC"])
    return os.cpu_count() if sys.platform == "darwin" else len(os.sched_getaffinity(0))


GIT_SECONDS = 10


def code_version() -> dict[str, Any]:
    """Return the package's version and, in a git repository, the commit and whether tracked files changed (`dirty`).

    The repository is the one that tracks the running source code. For an installed package, it is the repository that
    contains the working directory.
    """
    package = Path(sophia_levanter.__file__).parent
    # A virtual environment may be inside an unrelated repository that does not track it.
    tracked = _git(package, "ls-files", "--error-unmatch", Path(sophia_levanter.__file__).name) is not None
    place = package if tracked else Path.cwd()
    found: dict[str, Any] = {"version": sophia_levanter.__version__}
    commit = _git(place, "rev-parse", "HEAD")
    status = _git(place, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return found
    return found | {"commit": commit, "dirty": bool(status), "repository": "source" if tracked else "working directory"}


def _git(directory: Path, *arguments: str) -> str | None:
    """Return the output of a git command, or None if git is not installed, fails or times out."""
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def enable_compilation_cache(directory: Path, platform: str) -> None:
    """Make jax cache compiled programs in a directory, unless JAX_COMPILATION_CACHE_DIR already specifies one.

    CPU programs are not cached, because jaxlib may fail to read its own cache files and print a warning each time
    (https://github.com/jax-ml/jax/issues/38445).
    """
    if platform != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def shared_config(config: TrainConfig) -> str:
    """Return the settings that all processes must share, as text. Each process may have its own copy of the data."""
    mesh = config.mesh if config.mesh.process_id is None else replace(config.mesh, process_id=0)
    trainer = config.trainer
    if trainer.checkpoint_dir is not None:
        trainer = replace(trainer, run_dir="each its own")
    sets = dict.fromkeys(config.data.validation_sets, "each its own")
    data = DataConfig(validation=sets.get("", sets or None), mask_documents=config.data.mask_documents)
    return dump_config(replace(config, mesh=mesh, data=data, trainer=trainer))
