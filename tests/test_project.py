"""What stands around the code: continuous integration, the version, the citation."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from pages import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
MAKEFILE = (ROOT / "Makefile").read_text()


def targets_in(script):
    return set(re.findall(r"^ *make ([\w-]+)", script, re.MULTILINE))


def steps_of(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=[workflow.stem for workflow in WORKFLOWS])
def test_workflows_call_targets_of_the_makefile(workflow):
    called = {target for step in steps_of(workflow) for target in targets_in(step.get("run", ""))}
    assert called
    assert not [target for target in called if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=[workflow.stem for workflow in WORKFLOWS])
def test_workflows_say_what_they_may_do_and_how_long(workflow):
    tree = yaml.safe_load(workflow.read_text())
    assert tree["permissions"]
    assert all(job["timeout-minutes"] > 0 for job in tree["jobs"].values())
    assert all(re.search(r"@v\d+$", step["uses"]) for step in steps_of(workflow) if "uses" in step)


def test_both_continuous_integrations_check_the_same():
    (ci,) = [workflow for workflow in WORKFLOWS if workflow.stem == "ci"]
    of_github = {target for step in steps_of(ci) for target in targets_in(step.get("run", ""))}
    assert of_github == targets_in((ROOT / ".ci" / "run").read_text()) == {"lint", "docs", "test"}


def test_the_versions_of_python_are_those_of_the_package():
    (ci,) = [workflow for workflow in WORKFLOWS if workflow.stem == "ci"]
    (job,) = yaml.safe_load(ci.read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == PYTHONS == ["3.11", "3.12", "3.13"]


def pins_on(python):
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len({pin.name for pin in pins}) == len(pins)
    return {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_what_the_package_requires(python):
    pins = pins_on(python)
    assert pins["jaxlib"] == pins["jax"]
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["tpu"]):
        assert requirement.specifier.contains(pins[requirement.name], prereleases=True), requirement


@pytest.mark.parametrize("name", ["jax", "haliax"])
def test_later_versions_than_were_tested_are_not_installed(name):
    """jax removes names that haliax uses."""
    newest = max(Version(pins_on(python)[name]) for python in PYTHONS)
    later = f"{newest.major}.{newest.minor + 1}"
    requirements = map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["tpu"])
    assert not any(requirement.specifier.contains(later) for requirement in requirements if requirement.name == name)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    assert citation["cff-version"] == "1.2.0"
    assert re.search(
        rf"^## \[?(?:Unreleased\], to be )?{re.escape(VERSION)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_citation_names_the_paper():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert "2305.14342" in paper["doi"]
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Li", "Hall", "Liang", "Ma"]
