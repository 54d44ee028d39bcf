"""Without extras, in an environment of its own, the package installs and its optimizers run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("haliax", "draccus", "orbax", "ray", "datasets", "wandb")

pytestmark = pytest.mark.slow


def run(*command, cwd):
    # Nothing of this environment or of the repository may be importable there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment with the package in it."""
    folder = tmp_path_factory.mktemp("install")
    # A copy, because setuptools leaves a build folder where it builds.
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
    if run(*pip, "setuptools", cwd=folder).returncode:
        pytest.skip("pip reaches no package registry")
    installed = run(*pip, ".", cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return python


def test_readme_example_runs(python, tmp_path):
    section = (ROOT / "README.md").read_text().split("## The optimizer in a model of your own")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    result = run(python, "example.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < 0.7  # log 3 = 1.1 is what knowing nothing costs


def test_optimizers_import_nothing_heavy(python, tmp_path):
    program = "import sys, sophia_levanter.optim as o; print(o.__file__); print(*sorted(sys.modules))"
    result = run(python, "-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    where, modules = result.stdout.splitlines()
    assert Path(where).is_relative_to(python.parents[1])
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert {"jax", "equinox", "optax"} <= loaded
    assert not loaded & set(HEAVY)
