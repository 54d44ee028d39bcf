"""The wheel, without extras and in an environment of its own: commands, a run, the optimizers."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pages import ROOT

HEAVY = ("haliax", "draccus", "orbax", "ray", "datasets", "wandb")

pytestmark = pytest.mark.slow


def run(*command, cwd):
    # Nothing of this environment or of the repository may be importable there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("install")
    # A copy, because make and setuptools leave folders where they build.
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
    if run(*pip, "setuptools", cwd=folder).returncode:
        pytest.skip("pip reaches no package registry")
    built = run("make", "wheel", f"PYTHON={sys.executable}", cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,), (source,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    from_source = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "from_source", source)
    assert run(sys.executable, "-m", "pip", *from_source, cwd=folder).returncode == 0
    # Files that the source distribution lacks would be missing for those who install from it.
    assert zipfile.ZipFile(folder / "from_source" / wheel.name).namelist() == zipfile.ZipFile(wheel).namelist()
    installed = run(*pip, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    shutil.rmtree(folder / "src")
    return python


def test_the_commands_are_there(python, tmp_path):
    script = python.with_name("sophia-levanter")
    listed = run(script, "--help", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    verbs = re.search(r"\{(.*)\}", listed.stdout)[1].split(",")
    assert {"train", "plan", "launch"} <= set(verbs)
    for verb in verbs:
        said = run(script, verb, "--help", cwd=tmp_path)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith("usage:")


def test_a_run_with_a_configuration_of_ones_own(python, tmp_path):
    """The file that the page on configurations gives for those who have the package and not the repository."""
    page = (ROOT / "docs" / "configuration.md").read_text().split("## Without the repository")[1]
    (tmp_path / "tiny.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    command = ("train", "--config", "tiny.yaml", "--trainer.num_train_steps", 5, "--optimizer.warmup", 2)
    own = ("--data.cache_dir", "cache", "--trainer.run_dir", "run", "--trainer.evaluation_windows", 8)
    trained = run(python.with_name("sophia-levanter"), *command, *own, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "train/loss" in line] == [0, 1, 2, 3, 4]
    checked = run(python, "-m", "sophia_levanter.commands.checkpoints", "verify", "run", cwd=tmp_path)
    assert "step 5: intact" in checked.stdout


def test_readme_example_runs(python, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
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
