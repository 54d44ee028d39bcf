"""A whole run on a spot slice that is taken away: launcher, gcloud and training are real, Google Cloud is not."""

import os
import shutil
import sys

import numpy as np
import pytest
from fake_tpu_api import FakeTpuApi, hosts_of_this_machine, serving
from launched import Launched, losses, training_process

import fake_gcs
from tiny_runs import xla_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed"),
]


def test_a_spot_slice_that_is_taken_away(undisturbed, tmp_path):
    cache = os.path.expanduser("~/.cache/sophia_levanter")
    run_dir = tmp_path / "run"
    hosts_of_this_machine(tmp_path)
    with serving(FakeTpuApi(hosts=1)) as api, fake_gcs.serving(fake_gcs.FakeGcs()) as bucket:
        variables = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(2),
            "TENSORSTORE_GCS_HTTP_URL": bucket.address,
        }
        lines = ["backend: gcloud", "zone: us-central2-b", "accelerator: v4-8", "capacity: spot", "name: run"]
        lines += [f"python: {sys.executable}", "env:", *(f"  {name}: {value}" for name, value in variables.items())]
        (tmp_path / "cluster.yaml").write_text("\n".join(lines))
        options = ["--trainer.checkpoint_dir", "gs://bucket/run", "--data.cache_dir", cache]
        with Launched(run_dir, tmp_path / "cluster.yaml", *options, env=api.environment(tmp_path)) as run:
            run.until_step(15)
            training = training_process(run_dir)
            with api.lock:
                api.scripts["run"] = ["SUSPENDED"]
            # The machine goes, and its disk with it.
            training.kill()
            (run_dir / "metrics.jsonl").rename(tmp_path / "metrics before")
            (run_dir / "config.yaml").unlink()
            assert run.wait() == 0, run.text
    assert "preempted: machines were lost; process-0 was killed by SIGKILL; failures 0 of 10, preempt" in run.text
    assert run.text.count("created queued resource run; it is billed") == 2
    methods = [method for method, path, _ in api.requests if "queuedResources" in path]
    assert [method for method in methods if method in ("POST", "DELETE")] == ["POST", "DELETE"] * 2
    resumed = int(run.text.split("resuming after step ")[1].split()[0])
    assert resumed >= 10
    np.testing.assert_allclose(losses(run_dir, first=resumed), undisturbed[resumed:], rtol=0, atol=1e-5)
