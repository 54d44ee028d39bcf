"""The manifests for Ray are what Ray, the clouds and KubeRay take, a misspelt key is refused, and nothing is open."""

import re
import shlex

import pytest
import yaml
from infra_checks import (
    KUBERAY,
    RAY,
    RAY_UP,
    ROOT,
    Refused,
    check_cluster,
    check_rayjob,
    complaints_of_bash,
    groups,
    misspelt,
    pods,
    start_options,
    validator,
)

from sophia_levanter.cluster.config import RayCluster, read_cluster
from sophia_levanter.config.command_line import parse_command_line
from sophia_levanter.planning.target import tpu_shape

CLUSTERS = sorted(path.name for path in RAY_UP.glob("*.yaml"))
RAYJOBS = sorted(path.name for path in KUBERAY.glob("*.yaml"))


def load(name):
    return yaml.safe_load(((RAY_UP if name in CLUSTERS else KUBERAY) / name).read_text())


def test_there_are_manifests():
    assert CLUSTERS == ["cluster_aws_gpu.yaml", "cluster_gcp_tpu.yaml"]
    assert RAYJOBS == ["rayjob.yaml", "rayjob_gpu.yaml"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_a_cluster(name):
    config = check_cluster(load(name))
    workers = {key: value for key, value in config["available_node_types"].items() if key != config["head_node_type"]}
    assert config["max_workers"] == sum(node_type["max_workers"] for node_type in workers.values())
    # Ray's defaults, which install an old Ray and let the world in, are all replaced.
    text = (RAY_UP / name).read_text()
    assert all(f"\n{key}:" in text for key in config if key.endswith("_commands") and key != "initialization_commands")


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_misspelt_key_of_a_cluster_is_refused(name):
    manifest = load(name)
    accepted = []
    for where, changed in misspelt(manifest):
        try:
            check_cluster(changed)
        except Refused:
            continue
        accepted.append(where)
    # The names of node types are the file's own.
    assert [where for where in accepted if where[:-1] != ("available_node_types",)] == []


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_open_to_nobody(name):
    manifest = load(name)
    assert manifest["provider"]["use_internal_ips"] is True
    assert "security_group" not in manifest["provider"]
    head = start_options(manifest["head_start_ray_commands"][-1])
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    for command in (manifest["head_start_ray_commands"][-1], manifest["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token" in command
    for node_type in manifest["available_node_types"].values():
        node = node_type["node_config"]
        if manifest["provider"]["type"] == "aws":
            assert node["SecurityGroupIds"]
        elif "machineType" in node:
            assert not any("accessConfigs" in interface for interface in node["networkInterfaces"])
        else:
            assert node["networkConfig"]["enableExternalIps"] is False


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_clusters_commands_are_shell(name):
    manifest = load(name)
    for key in manifest:
        for command in manifest[key] if key.endswith("_commands") else ():
            assert complaints_of_bash(command) == ""
            assert not re.search(r"\b(curl|wget)\b", command)


@pytest.mark.parametrize("name", RAYJOBS)
def test_kuberay_takes_a_rayjob(name):
    check_rayjob(load(name))


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_misspelt_key_of_a_rayjob_is_refused(name):
    changes = list(misspelt(load(name)))
    assert len(changes) > 80
    for where, changed in changes:
        with pytest.raises(Refused):
            check_rayjob(changed)
            pytest.fail(f"{where} is taken misspelt")


@pytest.mark.parametrize("name", RAYJOBS)
def test_pods_have_no_rights(name):
    manifest = load(name)
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjob_is_open_to_nobody(name):
    cluster = load(name)["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False


@pytest.mark.parametrize("name", RAYJOBS)
def test_secrets_come_from_the_store(name):
    variables = [
        variable for pod in pods(load(name)) for container in pod["containers"] for variable in container.get("env", ())
    ]
    assert variables
    for variable in variables:
        assert variable.keys() == {"name", "valueFrom"}
        assert variable["valueFrom"].keys() == {"secretKeyRef"}


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjob_ends_with_its_run(name):
    spec = load(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    # KubeRay would try again what the launcher has given up.
    assert spec["backoffLimit"] == 0


@pytest.mark.parametrize("name", RAYJOBS)
def test_the_entrypoint_fits_the_cluster(name):
    manifest = load(name)
    words = shlex.split(manifest["spec"]["entrypoint"].replace("/app/", f"{ROOT}/"))
    assert words[:3] == ["python", "-m", "sophia_levanter.commands.launch"]
    at = words.index("--cluster")
    cluster = read_cluster(ROOT / words[at + 1])
    assert isinstance(cluster, RayCluster)
    config = parse_command_line(words[3:at] + words[at + 2 :]).config
    assert config.trainer.checkpoint_dir.startswith("gs://")
    (workers,) = groups(manifest)[1:]
    assert cluster.num_processes == workers["replicas"] * workers.get("numOfHosts", 1)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    selector = workers["template"]["spec"]["nodeSelector"]
    if cluster.accelerator:
        shape = tpu_shape(cluster.accelerator)
        assert selector["cloud.google.com/gke-tpu-topology"] == shape.topology
        assert limits["google.com/tpu"] * workers["numOfHosts"] == shape.chips
    else:
        assert limits["nvidia.com/gpu"] == cluster.gpus_per_worker
    assert cluster.auth == manifest["spec"]["rayClusterSpec"]["authOptions"]["mode"]


def test_launcher_files_fit_their_clusters():
    slices = load("cluster_gcp_tpu.yaml")["available_node_types"]["tpu_v4_32"]
    tpu = read_cluster(RAY / "tpu_v4_32.yaml")
    assert slices["node_config"]["acceleratorType"] == tpu.accelerator
    assert slices["node_config"]["runtimeVersion"] == tpu.shape.runtime_version
    assert slices["resources"]["TPU"] == tpu.shape.chips // tpu.shape.hosts
    assert slices["max_workers"] == tpu.slices
    nodes = load("cluster_aws_gpu.yaml")["available_node_types"]["gpu_8"]
    gpu = read_cluster(RAY / "gpu_2x8.yaml")
    assert (nodes["resources"]["GPU"], nodes["max_workers"]) == (gpu.gpus_per_worker, gpu.workers)
    assert tpu.auth == gpu.auth == "token"


def test_the_schema_of_rayjobs_knows_no_open_object():
    """A mapping of the schema either names its keys and no others, or says of what type its values are."""
    for name, definition in validator("kuberay/rayjob.schema.json").schema["$defs"].items():
        if definition.get("type") == "object":
            assert "additionalProperties" in definition, name
