"""The Dockerfiles are pinned, small in what they let in, and run as nobody in particular; no image is built here."""

import fnmatch
import re
import shlex
from pathlib import PurePath

import pytest
from infra_checks import KUBERAY, ROOT, complaints_of_bash

from sophia_levanter.cluster.config import SECRET

DOCKERFILES = sorted((ROOT / "infra" / "docker").glob("*.Dockerfile"))
every = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


def instructions(path):
    """Of a Dockerfile: pairs of a name and the rest of its line, continued lines as one."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def of_kind(path, kind):
    return [rest for name, rest in instructions(path) if name == kind]


def test_there_are_images():
    assert [path.stem for path in DOCKERFILES] == ["cuda", "tpu"]


@every
def test_only_known_instructions(path):
    assert {name for name, _ in instructions(path)} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"}


@every
def test_bases_are_pinned(path):
    bases = of_kind(path, "FROM")
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+( AS build)?", base)


@every
def test_runs_as_a_user_with_a_number(path):
    (user,) = of_kind(path, "USER")
    assert [name for name, _ in instructions(path)][-2:] == ["USER", "CMD"]
    number = int(user.partition(":")[0])
    assert number > 0
    assert f"useradd --uid {number} " in " ".join(of_kind(path, "RUN"))
    # Of which the pods' manifests say the same.
    for manifest in KUBERAY.glob("rayjob*.yaml"):
        assert f"runAsUser: {number}\n" in manifest.read_text()


@every
def test_no_secrets(path):
    for names in of_kind(path, "ENV"):
        for word in shlex.split(names):
            assert not SECRET.search(word.partition("=")[0])


def test_drivers_of_google_kubernetes_engine_are_found():
    path = next(path for path in DOCKERFILES if path.stem.startswith("cuda"))
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in of_kind(path, "ENV")


@every
def test_commands_are_shell_and_fetch_no_scripts(path):
    for command in of_kind(path, "RUN"):
        assert complaints_of_bash(command) == ""
        assert not re.search(r"\bcurl\b|wget +(-|http)|\| *(ba)?sh\b|https?://", command)


@every
def test_packages_are_pinned(path):
    installs = [part for command in of_kind(path, "RUN") for part in command.split("&&") if "pip install" in part]
    assert len(installs) == 2
    assert all("-c constraints.txt" in install and "--no-cache-dir" in install for install in installs)
    assert "-c infra/constraints.txt" in installs[-1]


def allowed_in(pattern_lines, path):
    """Whether .dockerignore lets a path of the repository go to the builder: of lines that fit it, the last counts."""
    allowed = True
    for line in pattern_lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        places = [path, *(parent for parent in path.parents if str(parent) != ".")]
        names = [place.name for place in places] if "**/" in line else [str(place) for place in places]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            allowed = line.startswith("!")
    return allowed


IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


@every
def test_what_is_copied_is_there_and_allowed(path):
    sources = [
        source for words in of_kind(path, "COPY") if "--from=" not in words for source in shlex.split(words)[:-1]
    ]
    assert {"src", "constraints.txt", "infra/constraints.txt"} <= set(sources)
    for source in sources:
        found = ROOT / source
        assert found.exists(), source
        inside = (
            [found] if found.is_file() else [file for file in found.rglob("*.*") if file.suffix in (".py", ".yaml")]
        )
        assert inside
        for file in inside:
            if "__pycache__" not in file.parts:
                assert allowed_in(IGNORE, file.relative_to(ROOT)), file


KEPT = """
.git/config .venv/bin/python .env src/.env.local config/key.pem runs/one/config.yaml
src/sophia_levanter/__pycache__/a.pyc .cache/tokens tests/conftest.py infra/gpu/slurm.yaml
"""


@pytest.mark.parametrize("name", KEPT.split())
def test_nothing_else_goes_to_the_builder(name):
    assert not allowed_in(IGNORE, PurePath(name))


def test_pins_agree():
    """What infra/constraints.txt pins is pinned there alone, and goes with the versions of jax and Ray."""
    pins = [
        {
            re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
            for line in file.read_text().splitlines()
            if "==" in line
        }
        for file in (ROOT / "constraints.txt", ROOT / "infra" / "constraints.txt")
    ]
    assert all(pins)
    assert not pins[0] & pins[1]
    for version_and_python in re.findall(r"^jax==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE):
        assert f"jax-cuda13-plugin=={version_and_python}\n" in (ROOT / "infra" / "constraints.txt").read_text()
    (version,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for manifest in KUBERAY.glob("rayjob*.yaml"):
        assert f"rayVersion: {version}\n" in manifest.read_text()
