"""Holds the shipped manifests to the rules of those who read them: Ray, the clouds, Kubernetes and KubeRay."""

from __future__ import annotations

import copy
import functools
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
RAY, RAY_UP, KUBERAY = (ROOT / "infra" / name for name in ("ray", "ray_up", "kuberay"))
GOLDEN = ROOT / "tests" / "golden"

# Maps whose keys a schema leaves free, and the names that mean something in them.
RESOURCES = {"cpu", "memory", "ephemeral-storage", "google.com/tpu", "nvidia.com/gpu"}
NODE_LABELS = {f"cloud.google.com/gke-{name}" for name in ("tpu-accelerator", "tpu-topology", "spot", "accelerator")}
RAY_RESOURCES = {"CPU", "GPU", "TPU"}
# The one file from outside the repository that machines get.
TOKEN = "~/.ray/auth_token"


class Refused(Exception):
    """A manifest that its reader would refuse, or misread."""


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """What holds a tree to a schema among the golden files."""
    schema = json.loads((GOLDEN / name).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def hold(tree: Any, name: str) -> None:
    for error in validator(name).iter_errors(tree):
        raise Refused(f"{error.json_path}: {error.message}")


@functools.cache
def run_instances() -> Any:
    """The request with which instances of EC2 are started."""
    return botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def complaints_of_bash(script: str) -> str:
    """What bash says against a script, which it does not run."""
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr


def check_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """A file for `ray up`, as Ray completes it.

    Raises:
        Refused: if Ray, the cloud's API or `ray start` would not have it.
    """
    try:
        # Without these, Ray's own functions end in a KeyError before they look at the rest.
        if missing := {"provider", "available_node_types", "head_node_type"} - manifest.keys():
            raise Refused(f"{missing} missing")
        config = prepare_config(copy.deepcopy(manifest))
        validate_config(config)
        ray_schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
        _known(manifest["provider"], set(ray_schema["properties"]["provider"]["properties"]))
        for node_type in config["available_node_types"].values():
            _known(node_type["resources"], RAY_RESOURCES)
            _check_node(node_type["node_config"], manifest["provider"]["type"])
    except (jsonschema.ValidationError, botocore.exceptions.ParamValidationError, ValueError, KeyError) as error:
        raise Refused(str(error)) from error
    for remote, local in manifest["file_mounts"].items():
        if (remote, local) != (TOKEN, TOKEN):
            if not (ROOT / local).exists():
                raise Refused(f"{local} is not there")
            if remote != f"~/sophia_levanter/{local}":
                raise Refused(f"{remote} is not where {local} is looked for")
    for command in (*manifest["head_start_ray_commands"], *manifest["worker_start_ray_commands"]):
        start_options(command)
    return config


def _check_node(node: dict[str, Any], provider: str) -> None:
    if provider == "gcp":
        kind = "tpu_node" if "machineType" not in node else "instance"
        hold(node, f"gcp/{kind}.schema.json")
        if not {"machineType", "acceleratorType"} & node.keys():
            raise Refused("neither an instance nor a TPU")
    else:
        # Ray's own key, from which it takes the instance's subnet.
        request = {"SubnetId" if key == "SubnetIds" else key: value for key, value in node.items()}
        request["SubnetId"] = request["SubnetId"][0]
        model = run_instances()
        if unknown := request.keys() - model.members.keys():
            raise Refused(f"{unknown} unknown to EC2")
        report = botocore.validate.ParamValidator().validate(request | {"MinCount": 1, "MaxCount": 1}, model)
        if report.has_errors():
            raise Refused(report.generate_report())
        for key, value in node.items():
            _check_members(value, model.members.get(key))


def _check_members(value: Any, shape: Any) -> None:
    """What botocore lets pass: unknown members, which it leaves out of the request."""
    if shape is None:
        return
    if shape.type_name == "structure":
        _known(value, set(shape.members))
        for key, member in value.items():
            _check_members(member, shape.members[key])
    elif shape.type_name == "list":
        for item in value:
            _check_members(item, shape.member)


def check_rayjob(manifest: dict[str, Any]) -> None:
    """A RayJob.

    Raises:
        Refused: if Kubernetes, KubeRay or `ray start` would not have it.
    """
    hold(manifest, "kuberay/rayjob.schema.json")
    for group in groups(manifest):
        start_options(
            shlex.join(["ray", "start", *(f"--{key}={value}" for key, value in group["rayStartParams"].items())])
        )
    for pod in pods(manifest):
        _known(pod.get("nodeSelector", {}), NODE_LABELS)
        for container in pod["containers"]:
            for amounts in container["resources"].values():
                _known(amounts, RESOURCES)


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's and the workers'."""
    cluster = manifest["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of all pods that a RayJob makes."""
    return [
        manifest["spec"]["submitterPodTemplate"]["spec"],
        *(group["template"]["spec"] for group in groups(manifest)),
    ]


def start_options(command: str) -> dict[str, Any]:
    """The options of the `ray start` in a shell command, as Ray's own parser reads them; none of another command."""
    words = shlex.split(command)
    if "start" not in words:
        return {}
    try:
        return start.make_context("start", words[words.index("start") + 1 :]).params
    except click.ClickException as error:
        raise Refused(error.format_message()) from error


def _known(mapping: dict[str, Any], names: set[str]) -> None:
    if unknown := set(mapping) - names:
        raise Refused(f"{unknown} unknown")


def misspelt(tree: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Copies of a tree with one key each that has an x too many, and where; every key of every mapping has its turn."""
    for at, mapping in _mappings(tree, where):
        for key in mapping:
            changed = copy.deepcopy(tree)
            parent = changed
            for step in at:
                parent = parent[step]
            parent[f"{key}x"] = parent.pop(key)
            yield (*at, key), changed


def _mappings(tree: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(tree, dict):
        yield where, tree
        for key, value in tree.items():
            yield from _mappings(value, (*where, key))
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _mappings(item, (*where, index))
