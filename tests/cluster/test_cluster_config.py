"""Clusters' files: what they say, and what is wrong with them; TPU slices by their names."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from sophia_levanter.accelerators import GIB, TPUS
from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.config import (
    ClusterConfig,
    GcloudCluster,
    LocalCluster,
    RayCluster,
    SlurmCluster,
    read_cluster,
)
from sophia_levanter.config.settings import setting
from sophia_levanter.errors import InputError
from sophia_levanter.planning.target import GENERATIONS, shapes_of, tpu_shape

INFRA = Path(__file__).parents[2] / "infra" / "tpu"


def read(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return read_cluster(path)


def test_each_backend_has_its_fields(tmp_path):
    local = read(
        tmp_path, "backend: local\nprocesses: 3\nback_off: 1\nenv: {A_B: '1', C: \"x y\"}\nsecrets: [API_KEY]\n"
    )
    assert local == LocalCluster(processes=3, back_off=1.0, env={"A_B": "1", "C": "x y"}, secrets=("API_KEY",))
    ray = read(tmp_path, "backend: ray\naccelerator: v4-32\nslices: 2\n")
    assert isinstance(ray, RayCluster) and ray.num_processes == 8
    assert read(tmp_path, "backend: ray\nworkers: 2\ngpus_per_worker: 8\n").num_processes == 2
    slurm = read(tmp_path, "backend: slurm\nnodes: 2\ngpus_per_node: 8\ntime: 12:00:00\noptions: [--qos=high]\n")
    assert isinstance(slurm, SlurmCluster) and slurm.time == "12:00:00"
    gcloud = read(tmp_path, "backend: gcloud\nzone: us-central2-b\naccelerator: v5e-16\ncapacity: spot\n")
    assert isinstance(gcloud, GcloudCluster) and gcloud.num_processes == 4
    assert gcloud.shape.accelerator_type == "v5litepod-16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("processes: 2\n", "backend is missing; it must be one of local, ray, slurm, gcloud"),
        ("backend: kubernetes\n", "backend is 'kubernetes'; it must be one of"),
        ("backend: [local]\n", "backend is a list; it must be one of"),
        ("backend: local\nproceses: 2\n", "unknown key 'proceses'; did you mean processes?"),
        ("backend: local\nprocesses: 2000\n", "processes is 2000; it must be between 1 and 1024"),
        ("backend: local\nsecrets: [1]\n", "secrets[0] is 1; it must be a string; quote it"),
        ("backend: local\nprocesses: 2.0\n", "processes is 2.0; it must be an integer"),
        ("backend: local\nback_off: -1\n", "back_off is -1.0; it must be between 0 and 300"),
        ("backend: local\nenv: [A]\n", "env is *** (list); it must be a mapping of NAME: VALUE pairs"),
        ("backend: local\nenv: {A: 1}\n", "env.A is *** (int); it must be a quoted string"),
        ("backend: local\nenv: {A: [b]}\n", "env.A is a list; it must be a quoted string"),
        ("backend: local\nenv: A=hunter2\n", "env is *** (str); it must be a mapping of NAME: VALUE pairs"),
        ("backend: local\nenv: {1A: x}\n", "'1A' is not a valid environment variable name"),
        ("backend: local\nsecrets: WANDB_API_KEY\n", "secrets is 'WANDB_API_KEY'; it must be a list of strings"),
        ("backend: local\nsecrets: ['A=b']\n", "'A=b' is not a valid environment variable name"),
        ("backend: ray\n", "specify either workers (the number of processes) or accelerator"),
        ("backend: ray\nworkers: 2\naccelerator: v4-32\n", "specify either workers"),
        ("backend: ray\naccelerator: v4-33\n", "accelerator is 'v4-33'; it must be one of v4-8, v4-16"),
        ("backend: ray\nworkers: 2\nslices: 2\n", "slices is 2, but accelerator is missing"),
        (
            "backend: ray\nworkers: 2\naddress: ray://head:10001\n",
            "address is 'ray://head:10001'; it must be auto, local",
        ),
        ("backend: ray\nworkers: 2\naddress: head\n", "address is 'head'; it must be auto, local or HOST:PORT"),
        ("backend: ray\nworkers: 2\nauth: none\n", "auth is 'none'; it must be disabled or token"),
        ("backend: slurm\nsave_before: 100\n", "save_before is 100; it must be at least stop_timeout 120 + 30"),
        ("backend: slurm\npartition: a b\n", "partition is 'a b'; it must be a single word"),
        (
            "backend: slurm\noptions: [qos=high]\n",
            "options contains 'qos=high'; it must be an sbatch option such as --qos=high",
        ),
        ("backend: gcloud\nzone: z\n", "accelerator is missing; specify a TPU slice such as v4-32"),
        ("backend: gcloud\naccelerator: v4-8\n", "zone is missing"),
        (
            "backend: gcloud\nzone: z\naccelerator: v4-8\ncapacity: cheap\n",
            "capacity is 'cheap'; it must be one of on-",
        ),
        ("backend: gcloud\nzone: z\naccelerator: v4-8\nname: A_b\n", "name is 'A_b'; it must be at most 40"),
    ],
)
def test_a_mistake_has_one_line(text, message, tmp_path):
    with pytest.raises(InputError, match=r"cluster\.yaml") as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="file not found"):
        read_cluster(tmp_path / "none.yaml")


SECRET = """
DB_PASSWD PGPASS PASSPHRASE SSH_PASSPHRASE DB_PASS PASS SSHPASS PASSCODE MYSQL_PWD HF_CREDS AWS_CREDENTIALS AUTH
NPM_AUTH HTTP_AUTHORIZATION SESSION_COOKIE COOKIES SSH_PRIVATE SENTRY_DSN MY_JWT APIKEY api_key PGPASSWORD KEY2
HF_TOKEN TOKEN_FOR_WANDB MY_SECRETS pgPass
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_a_name_that_looks_like_a_secrets_is_refused_in_env(name, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, f"backend: local\nenv: {{{name}: hunter2}}\n")
    message = str(error.value)
    assert f"env.{name} looks like a secret; list it under secrets and keep its value out of files" in message
    assert "hunter2" not in message and "\n" not in message


INNOCENT = """
XLA_PASSES XLA_FLAGS XLA_PASS_THROUGH TOKENIZERS_PARALLELISM GIT_AUTHOR_NAME RAY_AUTH_MODE XAUTHORITY PWD OLDPWD
BYPASS COMPASS SSH_ASKPASS PGPASSFILE PRIVATE_NETWORK KEYBOARD SECRETARY JAX_PLATFORMS NCCL_DEBUG
XLA_PYTHON_CLIENT_MEM_FRACTION
"""


@pytest.mark.parametrize("name", INNOCENT.split())
def test_an_innocent_name_is_taken_in_env(name, tmp_path):
    assert read(tmp_path, f"backend: local\nenv: {{{name}: x}}\n").env == {name: "x"}


def test_a_backend_from_outside(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Cloud(ClusterConfig):
        region: str = setting("north", "where")

    monkeypatch.setitem(ClusterConfig.get_known_choices(), "cloud", Cloud)
    cluster = read(tmp_path, "backend: cloud\nregion: south\n")
    assert cluster == Cloud(region="south")
    with pytest.raises(InputError, match=r"^backend cloud: .*Cloud does not define build\(\)"):
        cluster.build(Job(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts", "memory", "runtime_version"),
    [
        ("v4-8", "2x2x1", 4, 1, 128, "tpu-ubuntu2204-base"),
        ("v5litepod-1", "1x1", 1, 1, 16, "v2-alpha-tpuv5-lite"),
        ("v5e-16", "4x4", 16, 4, 256, "v2-alpha-tpuv5-lite"),
        ("v5p-12288", "16x16x24", 6144, 1536, 583680, "v2-alpha-tpuv5"),
        ("v6e-8", "2x4", 8, 1, 256, "v2-alpha-tpuv6e"),
    ],
)
def test_slices(name, topology, chips, hosts, memory, runtime_version):
    shape = tpu_shape(name)
    found = (shape.topology, shape.chips, shape.hosts, shape.memory / GIB, shape.runtime_version)
    assert found == (topology, chips, hosts, memory, runtime_version)
    assert shape.accelerator_type == name.replace("v5e", "v5litepod")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v4-12", "'v4-12'; it must be one of v4-8, v4-16, v4-32"),
        ("v5e-2", "'v5e-2'; it must be one of v5litepod-1, v5litepod-4"),
        ("v7-8", "'v7-8'; it must be a TPU slice such as v4-32, v5e-16, v5p-8 or v6e-64"),
        ("v4-32 --spot", "'v4-32 --spot'; it must be a TPU slice"),
    ],
)
def test_there_is_no_such_slice(name, wanted):
    with pytest.raises(InputError, match=r"^accelerator is ") as error:
        tpu_shape(name)
    assert wanted in str(error.value)


def test_the_table_for_people_is_the_one_in_the_code():
    rows = [line.strip("| \n").split(" | ") for line in (INFRA / "README.md").open() if line.startswith("| v")]
    assert rows == [
        [
            name,
            f"{TPUS[name].memory / GIB:.0f}",
            ", ".join(f"{s.accelerator_type} {s.topology}" for s in shapes_of(name)),
        ]
        for name in GENERATIONS
    ]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_chips_hosts_and_memory_follow_from_that_table(generation):
    for shape in shapes_of(generation):
        number = int(shape.accelerator_type.partition("-")[2])
        assert shape.chips == number // (2 if generation in ("v4", "v5p") else 1)
        assert shape.chips == math.prod(map(int, shape.topology.split("x")))
        assert shape.hosts == (1 if generation in ("v5e", "v6e") and shape.chips <= 8 else shape.chips / 4)
        assert shape.memory == shape.chips * TPUS[generation].memory


NO_KEY = "secrets lists MY_KEY, which is not set in the launcher's environment; export it first"
NO_TOKEN = "auth is 'token', but RAY_AUTH_TOKEN is not set and {} was not found; set RAY_AUTH_TOKEN, or set RAY_AUTH_TO"
SLICE = {"zone": "us-central2-b", "accelerator": "v4-8"}


@pytest.mark.parametrize(
    ("cluster", "environment", "message"),
    [
        (LocalCluster(secrets=("MY_KEY",)), {}, NO_KEY),
        (LocalCluster(secrets=("MY_KEY",)), {"MY_KEY": ""}, NO_KEY),
        (LocalCluster(secrets=("MY_KEY",)), {"MY_KEY": "x"}, None),
        (SlurmCluster(secrets=("MY_KEY",)), {}, NO_KEY),
        # A line of `setup` may export it, but only in the job.
        (SlurmCluster(secrets=("MY_KEY",), setup=(". keys.sh",)), {}, None),
        (SlurmCluster(secrets=("MY_KEY",), setup=(". keys.sh",)), {"SLURM_JOB_ID": "1"}, NO_KEY),
        # The hosts fetch it from Secret Manager.
        (GcloudCluster(secrets=("MY_KEY",), **SLICE), {}, None),
        (RayCluster(workers=1, auth="token", secrets=("MY_KEY",)), {"RAY_AUTH_TOKEN": "x"}, NO_KEY),
        (RayCluster(workers=1, auth="token", secrets=("MY_KEY",)), {}, f"{NO_KEY}; and auth is 'token', but RAY_AUTH"),
        (RayCluster(workers=1, auth="token"), {}, NO_TOKEN.format("~/.ray/auth_token")),
        (RayCluster(workers=1, auth="token"), {"RAY_AUTH_TOKEN_PATH": "no"}, NO_TOKEN.format("no")),
        (RayCluster(workers=1, auth="token"), {"RAY_AUTH_TOKEN_PATH": "token"}, None),
        (RayCluster(workers=1, auth="token", address="local"), {}, None),
        (RayCluster(workers=1), {}, None),
    ],
)
def test_secrets_that_a_launch_needs(cluster, environment, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").touch()
    for name in ("MY_KEY", "SLURM_JOB_ID", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    if message is None:
        cluster.check_secrets()
        return
    with pytest.raises(InputError) as raised:
        cluster.check_secrets()
    assert str(raised.value).startswith(message)
