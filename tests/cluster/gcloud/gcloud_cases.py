"""Clusters, backends and interpreters for the tests of the gcloud backend."""

import shlex
import sys
from pathlib import Path

from sophia_levanter.cluster.config import GcloudCluster
from sophia_levanter.cluster.gcloud import GcloudBackend

AWKWARD = "two  spaces, 'single' \"double\"; $(touch pwned) `id` \\ * ~ #\nand a second line"
# Prints what it was called with, as Python on a host: only the process that holds another one is real.
FAKE_PYTHON = """#!/bin/bash
if [ "$2" = sophia_levanter.cluster.host ]; then exec {python} "$@"; fi
exec {python} -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' "$@"
"""


def cluster(**fields):
    return GcloudCluster(**{"zone": "us-central2-b", "accelerator": "v4-32", "name": "a-run"} | fields)


def backend(**fields):
    return GcloudBackend(cluster(**fields), Path("My run"), poll=0.01)


def spec(accelerator="v4-32", **fields):
    return {"tpu": {"nodeSpec": [{"nodeId": "a-run", "node": {"acceleratorType": accelerator}} | fields]}}


def fake_python(folder):
    file = folder / "fake 'python"
    file.write_text(FAKE_PYTHON.format(python=shlex.quote(sys.executable)))
    file.chmod(0o755)
    return str(file)
