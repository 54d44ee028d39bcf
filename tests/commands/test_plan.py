"""`plan`: what it prints, and what it refuses before it compiles anything."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sophia_levanter.commands import plan
from sophia_levanter.planning.run_plan import largest

ROOT = Path(__file__).parents[2]
NANO = str(ROOT / "config/gpt2_nano_sophia.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config FILE is missing; for example, --config config/gpt2_large_sophia.yaml"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: file not found"),
        (["--config", NANO, "--mfu", "1.5"], "--mfu is '1.5'; it must be above 0 and at most 1"),
        (["--config", NANO, "--mfu", "half"], "--mfu is 'half'; it must be above 0 and at most 1"),
        (["--config", NANO, "--devices", "-3"], "--devices is '-3'; it must be an integer"),
        (["--config", NANO, "--devices", "9" * 5000], "--devices is '99999999999999999999…'; it must be an integer"),
        (["--config", NANO, "--target", "v4:" + "9" * 5000 + "x2x1"], "--target is 'v4:9999"),
        (
            ["--config", NANO, "--target", "2xv4-8", "--mesh.replica", "4"],
            "mesh.replica is 4, but --target has 2 slices; set --mesh.replica 2, so that only gradients are sent",
        ),
        (["--config", NANO, "--target", "v4:2x2x1", "--devices", "4"], "--devices cannot be combined with --target"),
        (["--config", NANO, "--devices", "3"], "trainer.batch_size 8 is not divisible by the 3 devices on mesh.data"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert plan.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


def planned(*words, flags=""):
    command = [sys.executable, "-m", "sophia_levanter.commands.plan", *words]
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def numbers(lines, start):
    line = next(line for line in lines if line.strip().startswith(start))
    return [float(word) for word in line.strip().removeprefix(start).split()]


def test_a_plan():
    config = str(ROOT / "config/gpt2_nano_sophia_h.yaml")
    # The suite's flags have XLA compile in a fraction of the time; the plan has its own number of devices.
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    words = ["--devices", "4", "--gpu", "a100-40", "--mesh.fsdp", "embed", "--model.scan_unroll", "1"]
    # To check groups, plan builds an abstract model, which must not start jax with another number of devices.
    groups = ["--optimizer.groups", "[{role: vector, weight_decay: 0}]"]
    lines = planned("--config", config, *words, *groups, flags=flags)
    assert lines[0] == "gpt2_nano_sophia_h on 4 x a100-40, 4 devices, data 4, embed over data"
    assert lines[1].startswith("approximate")
    assert lines[2].split() == ["attention", "blocked"]
    assert lines[3].split() == ["parameters", "853,120"]
    plain, refresh = numbers(lines, "total")
    assert 0 < plain <= refresh
    assert numbers(lines, "all-gather")[0] > 0
    time = next(i for i, line in enumerate(lines) if line.startswith("time"))
    # So few rows send more than they compute.
    assert lines[time + 1].startswith("  bounded by communication within a node: compute ")
    assert " s at an MFU of 0.4), memory traffic " in lines[time + 1]
    assert lines[time + 2] == "  hint: use a larger trainer.batch_size"
    assert lines[time + 3].endswith(" days for 1,000 steps of 1,024 tokens")
    assert lines[time + 4].endswith("memory 1,555 GB/s, links within a node 300 GB/s")
    assert "the largest trainer.microbatch_size that fits is 8 (trainer.batch_size 8)" in lines
    assert any("optimizer.curvature_microbatch_size" in line for line in lines)


@pytest.mark.parametrize(("limit", "wanted"), [(0, None), (1, 1), (2, 2), (5, 4), (12, 12), (100, 12)])
def test_the_largest_size_that_fits(limit, wanted):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    assert largest([1, 2, 3, 4, 6, 12], fits) == wanted
    assert len(asked) <= 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra tpu")
@pytest.mark.parametrize(
    ("target", "shown", "replicas"),
    [("v4:2x2x2", "v4:2x2x2", 1), ("v5e:2x4", "v5e:2x4", 1), ("2xv5e-4", "2 x v5e-4 (2x2)", 2)],
)
def test_a_plan_for_tpus(target, shown, replicas):
    mesh = ["--mesh.fsdp", "embed", "--mesh.replica", str(replicas)]
    lines = planned("--config", NANO, "--target", target, *mesh)
    layout = "data 8" if replicas == 1 else "replica 2 x data 4"
    assert lines[0].startswith(f"gpt2_nano_sophia on {shown}, 8 devices, {layout}, embed over data")
    assert not any("approximate" in line for line in lines)
    assert numbers(lines, "all-gather")[0] > 0
    if replicas == 1:
        assert not any("other slices" in line for line in lines)
        return
    # Each device sends its quarter of the gradient, which has two bytes a number or four, to the other slice.
    plain, refresh = numbers(lines, "to other slices")
    parameters = int(next(line for line in lines if line.startswith("parameters")).split()[1].replace(",", ""))
    assert 2 * parameters / 4 <= plain * 1e6 <= refresh * 1e6
    assert any("communication between slices" in line for line in lines)
