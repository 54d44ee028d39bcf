"""The command that lists, verifies, shows, compares and prunes checkpoints."""

import fcntl
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter.checkpoint import Retention, read_step, save, steps
from sophia_levanter.commands.checkpoints import main
from sophia_levanter.main import main as train
from sophia_levanter.tracking import console


def tree(step: int) -> dict:
    return {
        "model": {"up": {"weight": jnp.full((4, 3), float(step)), "bias": jnp.zeros(3)}, "same": jnp.arange(5.0)},
        "step": np.int32(step),
    }


def put(location: Path | str, step: int, content: dict | None = None, **metadata) -> None:
    save(location, step, content or tree(step), run_id="a run", metadata=metadata, retention=Retention(99))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 4; the second is the best. Tests only read them."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    for step in (1, 2, 3, 4):
        put(
            folder,
            step,
            best={"step": min(step, 2), "validation/loss": 3.5},
            metrics={"train/loss": 5.0 - step / 10, "validation/loss": 3.5 + abs(step - 2)},
            config={"optimizer": {"rho": 0.1 * step}, "model": {"num_layers": 2}},
        )
    return folder


@pytest.fixture
def saved(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of the four steps that a test may change."""
    return shutil.copytree(four_steps, tmp_path / "run")


def command(capfd, *words: object) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main([str(word) for word in words])
    out, error = capfd.readouterr()
    return status, out, error


def test_list(saved, capfd, monkeypatch):
    now = read_step(saved, 4).saved_at + 7200
    monkeypatch.setattr(console, "time", SimpleNamespace(time=lambda: now))
    (saved / "step-00000003" / "manifest.json").write_text("{}")
    status, out, _ = command(capfd, "list", saved)
    assert status == 0
    header, first, second, third, fourth = out.splitlines()
    assert header.split() == ["step", "saved", "size", "loss", "validation"]
    assert re.fullmatch(r" +1  2 hours ago +84 B +4\.9000 +4\.5000", first)
    assert re.fullmatch(r" +2  2 hours ago +84 B +4\.8000 +3\.5000  best", second)
    assert "3  damaged: " in third and str(saved / "step-00000003") in third
    assert "best" not in fourth


def test_verify(four_steps, capfd):
    status, out, _ = command(capfd, "verify", four_steps)
    assert status == 0
    assert [re.sub(r"\d\.\d s", "T", line) for line in out.splitlines()] == [
        f"step {step}: intact, 9 files, 84 B, T" for step in (1, 2, 3, 4)
    ]


def test_verify_finds_a_sound_chunk_of_another_step_and_edited_headers(saved, capfd):
    chunk = next((saved / "step-00000003").rglob("*up.weight/c*"))
    shutil.copy(str(chunk).replace("step-00000003", "step-00000002"), chunk)
    header = next((saved / "step-00000004").rglob("*up.weight/zarr.json"))
    described = json.loads(header.read_text())
    described["shape"] = [3, 4]
    header.write_text(json.dumps(described))
    manifest = saved / "step-00000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"float32"', '"int32"', 1))
    status, out, _ = command(capfd, "verify", saved)
    assert status == 1
    for path in (chunk, header, manifest):
        assert str(path) in out
    assert f"step 3: leaf model.up.weight, {chunk}" in out and "step 3: damaged, 1 file" in out.splitlines()
    assert "step 2: intact" in out
    assert command(capfd, "verify", saved, "--step", 2)[0] == 0


def test_show(saved, capfd):
    put(saved, 5, {"x": jnp.array([3.0, jnp.nan, 4.0])})
    status, out, _ = command(capfd, "show", saved, "--step", 2)
    assert status == 0
    assert out.startswith("step 2 of run a run, saved 20")
    lines = out.splitlines()
    assert "metrics: train/loss 4.8, validation/loss 3.5" in lines
    assert "config.optimizer: rho 0.2" in lines
    assert lines[lines.index("model") :] == [
        "model",
        "  same      float32[5], 1 chunk, 20 B, norm 5.477",
        "  up",
        "    bias    float32[3], 1 chunk, 12 B, norm 0",
        "    weight  float32[4, 3], 1 chunk, 48 B, norm 6.928",
        "step        int32[], 1 chunk, 4 B, = 2",
        "",
        "model: 3 arrays, 20 elements, 80 B",
    ]
    assert "x  float32[3], 1 chunk, 12 B, norm 5, 1 NON-FINITE" in command(capfd, "show", saved)[1]


def test_diff(saved, capfd):
    put(saved, 5, {"model": {"up": {"weight": jnp.ones((3, 4))}, "same": jnp.arange(5.0)}, "new": jnp.ones(2)})
    status, out, _ = command(capfd, "diff", saved, 1, 3)
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["config.optimizer.rho:", "0.1", "at", "step", "1,", "0.30000000000000004", "at", "step", "3"],
        ["model.up.weight", "relative", "change", "2.000e+00,", "largest", "change", "2.000e+00"],
        ["step", "relative", "change", "2.000e+00,", "largest", "change", "2.000e+00"],
        ["2", "of", "4", "arrays", "are", "identical"],
    ]
    out = command(capfd, "diff", saved, 4, 5)[1]
    assert "model.up.weight: float32[4, 3] at step 4, float32[3, 4] at step 5" in out
    assert "model.up.bias: float32[3] at step 4, missing at step 5" in out
    assert "new: missing at step 4, float32[2] at step 5" in out


def test_prune(saved, capfd):
    killed = saved / f"step-00000005.partial-{'0a' * 16}"
    shutil.copytree(saved / "step-00000004", killed)
    status, out, _ = command(capfd, "prune", saved, "--keep", 1, "--every", 3, "--dry_run")
    assert status == 0 and steps(saved) == [1, 2, 3, 4] and killed.exists()
    assert out.splitlines() == ["would remove step 1, 84 B", "steps to keep: 2, 3, 4; best: 2"]
    status, out, _ = command(capfd, "prune", saved, "--keep", 1)
    assert status == 0 and steps(saved) == [2, 4] and not killed.exists()
    assert out.splitlines() == ["removed step 1, 84 B", "removed step 3, 84 B", "steps kept: 2, 4; best: 2"]


def test_prune_keeps_a_whole_one(saved, capfd):
    for step in (2, 4):
        next((saved / f"step-0000000{step}").rglob("c*")).unlink()
    status, _, error = command(capfd, "prune", saved, "--keep", 1)
    assert status == 1
    assert error == "error: none of the steps to keep (2, 4) is intact; nothing was removed\n"
    assert steps(saved) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_real_run(config_file, tmp_path, capfd):
    run_dir = tmp_path / "run"
    assert train(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 0
    for place in (run_dir, run_dir / "checkpoints"):
        assert "12" in command(capfd, "list", place)[1].splitlines()[2]
    out = command(capfd, "show", run_dir)[1]
    assert "config.optimizer: type sophia_g, learning_rate 0.01" in out
    assert re.search(r"\n {8}c_attn\n {10}weight +float32\[2, 16, 3, 2, 8\], 1 chunk, 6\.1 kB, norm \d", out)
    assert re.search(r"\nmodel: \d+ arrays, 12,624 elements, 50\.5 kB\n", out)
    assert "step  relative  change" in re.sub(" +", "  ", command(capfd, "diff", run_dir, 6, 12)[1])

    # While it runs, nothing is removed.
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for place in (run_dir, run_dir / "checkpoints"):
            status, _, error = command(capfd, "prune", place, "--keep", 1)
            assert status == 2 and "is in use by another process" in error
    assert command(capfd, "prune", run_dir, "--keep", 1)[0] == 0
    elsewhere = ["--trainer.run_dir", str(tmp_path / "second"), "--trainer.checkpoint_dir", str(tmp_path / "kept")]
    assert train(["--config", str(config_file), *elsewhere]) == 0
    assert command(capfd, "verify", tmp_path / "second")[0] == 0


def test_a_bucket(monkeypatch, capfd):
    with serving(FakeGcs()) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        for step in (1, 2, 3):
            put("gs://bucket/run", step)
        assert len(command(capfd, "list", "gs://bucket/run/")[1].splitlines()) == 4
        assert command(capfd, "verify", "gs://bucket/run")[0] == 0
        under_way = f"run/step-00000004/arrays-{'0a' * 16}/x"
        bucket.objects[under_way] = (9, b"")
        assert command(capfd, "prune", "gs://bucket/run", "--keep", 1)[1].endswith("steps kept: 3; best: unknown\n")
        assert not [name for name in bucket.objects if "step-00000002" in name]
        assert under_way in bucket.objects


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command given; choose from list, verify, show, diff, prune, or see --help"),
        (["lst", "DIR"], "unknown command 'lst'; choose from list, verify, show, diff, prune; did you mean list?"),
        (["list"], "list: expected DIR, found 0 arguments; --help shows the options"),
        (["list", "DIR", "--step", "1"], "unknown option '--step'"),
        (["list", "nowhere"], "nowhere does not exist; specify a run directory"),
        (["list", "DIR/step-00000001/arrays"], "arrays contains no checkpoint (no step-* folder)"),
        (["show", "DIR/step-00000001"], "run, and the step, 1, separately"),
        (["list", "http://host/x"], "has an unsupported scheme; use a path, gs:// or s3://"),
        (["show", "DIR", "--step", "7"], "has no checkpoint for step 7; available steps: 1, 2, 3, 4"),
        (["verify", "DIR", "--step", "x"], "--step is 'x'; it must be an integer"),
        (["diff", "DIR", "1"], "diff: expected DIR A B, found 2 arguments"),
        (["diff", "DIR", "1", "y"], "step is 'y'; it must be an integer"),
        (["prune", "DIR"], "--keep N is missing; specify how many of the newest steps to keep"),
        (["prune", "DIR", "--keep", "0"], "--keep is 0; it must be at least 1"),
        (["prune", "DIR", "--keep", "9" * 30], "it must be an integer from 0 to 999,999,999"),
    ],
)
def test_bad_input(four_steps, capfd, words, message):
    status, out, error = command(capfd, *(word.replace("DIR", str(four_steps)) for word in words))
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert steps(four_steps) == [1, 2, 3, 4]


def test_damage_is_one_line(saved, capfd):
    next((saved / "step-00000004").rglob("c*")).unlink()
    status, _, error = command(capfd, "show", saved)
    assert status == 1 and error.startswith("error: leaf ") and error.count("\n") == 1


def test_help(capfd):
    status, out, _ = command(capfd, "--help")
    assert status == 0 and all(f"checkpoints {what} DIR" in out for what in ("list", "verify", "show", "diff", "prune"))
