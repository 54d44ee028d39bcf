"""How the gcloud backend comes by slices: the real gcloud and a fake API."""

import json
import os
import shutil
from pathlib import Path

import pytest
from gcloud_cases import backend, cluster, spec

from sophia_levanter.cluster.backend import Unavailable
from sophia_levanter.cluster.gcloud import Acquisition
from sophia_levanter.cluster.gcloud.commands import GcloudCommands, QueuedResource
from sophia_levanter.errors import InputError

GOLDEN = Path(__file__).parents[2] / "golden" / "gcloud"
pytestmark = [
    pytest.mark.slow,  # each call of gcloud takes about a second
    pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed"),
]


def acquire(said, stopped=lambda: False, **fields):
    resource = QueuedResource(GcloudCommands(cluster(**fields), "a-run"))
    return Acquisition(resource, 0.01, said.append, stopped).run()


@pytest.mark.parametrize(
    ("golden", "fields"),
    [
        ("on_demand", {}),
        ("spot", {"capacity": "spot", "accelerator": "v5e-16", "zone": "us-west4-a"}),
        (
            "reserved",
            {
                "capacity": "reserved",
                "accelerator": "v5p-128",
                "runtime_version": "v2-alpha-tpuv5-other",
                "project": "other-project",
                "network": "a-network",
                "subnetwork": "a-subnetwork",
                "service_account": "trainer@other-project.iam.gserviceaccount.com",
                "internal_ips": True,
            },
        ),
        ("two_slices", {"slices": 2, "accelerator": "v6e-64", "capacity": "spot", "zone": "us-east5-b"}),
    ],
)
def test_what_is_created(api, golden, fields):
    assert QueuedResource(GcloudCommands(cluster(**fields), "a-run")).create()
    ((method, path, body),) = api.requests
    assert {"method": method, "path": path, "body": body} == json.loads((GOLDEN / f"{golden}.json").read_text())


@pytest.mark.parametrize(
    "states",
    [["FAILED"], ["SUSPENDING", "SUSPENDED"], ["DELETING", "GONE"]],
)
def test_what_is_over_is_deleted_and_created_anew(api, states):
    api.add("a-run", spec(), states)
    said = []
    (node,) = acquire(said)
    assert node.addresses == ("10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3")
    deletions = 0 if states[0] == "DELETING" else 1
    assert len(api.bodies("DELETE", "a-run?alt=json&force=True")) == deletions
    assert len(api.bodies("POST", "queuedResourceId=a-run")) == 1
    assert said[0].startswith(f"queued resource a-run is {states[0]}; ")


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "GONE"])
def test_a_slice_that_lost_a_host_is_not_used_again(api, state):
    body = spec(nodeId=None, multisliceParams={"nodeCount": 2})
    api.add("a-run", body, ["ACTIVE"])
    api.nodes["a-run-1"] = (state, "HEALTHY")
    said = []
    nodes = acquire(said, slices=2)
    assert [node.name for node in nodes] == ["a-run-0", "a-run-1"]
    shown = "gone" if state == "GONE" else state
    assert said[0] == f"slice a-run-1 is {shown}; deleting and recreating it"
    assert [method for method, path, _ in api.requests if "queuedResources" in path and method != "GET"] == [
        "DELETE",
        "POST",
    ]


def test_a_slice_that_stays_sick_is_replaced(api, monkeypatch):
    monkeypatch.setattr("sophia_levanter.cluster.gcloud.SETTLE", 0.1)
    api.add("a-run", spec(), ["ACTIVE"])
    api.nodes["a-run"] = ("READY", "UNHEALTHY_TENSORFLOW")
    said = []
    acquire(said)
    sick = "slice a-run is READY and UNHEALTHY_TENSORFLOW"
    assert said[:2] == [sick, f"{sick}; deleting and recreating it"]


def test_a_creation_whose_answer_was_lost_is_gone_on_with(api):
    api.refusals, api.created_anyway = [(409, "Resource 'a-run' already exists")], True
    said = []
    assert len(acquire(said)) == 1
    assert said == ["queued resource a-run already exists"]


def test_a_quota_is_waited_for(api):
    api.refusals = [(429, "Quota limit reached")] * 2
    said = []
    assert len(acquire(said)) == 1
    assert said[0] == "gcloud: RESOURCE_EXHAUSTED: Quota limit reached; retrying"
    assert said[1].startswith("created queued resource")
    assert len(api.bodies("POST", "queuedResourceId=a-run")) == 3


def test_a_quota_is_not_waited_for_without_end(api):
    api.refusals = [(429, "Quota limit reached")] * 100
    with pytest.raises(
        Unavailable,
        match=r"no slices became available within 1 s \(start_timeout\); last state: gcloud: RESOURCE_EXHAUST",
    ):
        acquire([], start_timeout=1)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, "PERMISSION_DENIED: Permission denied on 'locations/moon-a' (or it may not exist)."),
        (404, "NOT_FOUND: Permission denied on 'locations/moon-a'"),
        (400, "INVALID_ARGUMENT: Permission denied on 'locations/moon-a'"),
        (401, "UNAUTHENTICATED: Permission denied on 'locations/moon-a'"),
    ],
)
def test_what_cannot_be_had_is_bad_input(api, job, status, said):
    api.refusals = [(status, "Permission denied on 'locations/moon-a' (or it may not exist).")]
    slices = backend()
    with pytest.raises(InputError) as error:
        slices.prepare(job, 1, lambda text: None, lambda: False)
    assert str(error.value).startswith(f"backend gcloud: queued resource a-run: {said}")
    assert "\n" not in str(error.value)
    before = len(api.requests)
    slices.release(lambda text: None)
    assert len(api.requests) == before


def test_another_queued_resource_of_that_name_is_left_alone(api, job):
    api.add("a-run", spec("v4-8"), ["ACTIVE"])
    slices = backend()
    with pytest.raises(
        InputError, match=r"^name a-run: a queued resource with this name exists with 1 x v4-8, but 1 x v4"
    ):
        slices.prepare(job, 1, lambda text: None, lambda: False)
    slices.release(lambda text: None)
    assert not api.bodies("DELETE", "")


def test_a_launcher_that_is_told_to_stop_does_not_wait(api, job):
    api.states = ["WAITING_FOR_RESOURCES"]
    said = []
    slices = backend()
    slices.prepare(job, 1, said.append, lambda: "queued resource a-run is WAITING_FOR_RESOURCES" in said)
    assert not api.bodies("GET", "/nodes/")
    slices.release(said.append)
    assert len(api.bodies("DELETE", "/queuedResources/a-run")) == 1


@pytest.mark.parametrize(
    ("state", "node", "preempted"),
    [
        ("ACTIVE", ("READY", "HEALTHY"), False),
        ("ACTIVE", ("PREEMPTED", "HEALTHY"), True),
        ("SUSPENDING", ("READY", "HEALTHY"), True),
        ("ACTIVE", ("GONE", ""), True),
        ("SUSPENDED", ("GONE", ""), True),
        ("GONE", ("GONE", ""), True),
    ],
)
def test_preemption(api, state, node, preempted):
    api.add("a-run", spec(), [state])
    api.nodes["a-run"] = node
    assert backend().was_preempted() is preempted


def test_no_answer_is_no_preemption(tmp_path, monkeypatch):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/bin/bash\necho 'ERROR: gcloud crashed (ConnectionError): no route to host' >&2; exit 1\n")
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert backend().was_preempted() is False


def test_slices_that_are_kept(api, job):
    api.add("a-run", spec(), ["ACTIVE"])
    said = []
    slices = backend(keep=True)
    slices.prepare(job, 1, said.append, lambda: False)
    slices.release(said.append)
    assert (
        "is kept and will be billed until you delete it: gcloud compute tpus queued-resources delete a-run" in said[-1]
    )
    assert not api.bodies("DELETE", "")
