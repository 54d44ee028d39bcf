"""What befalls a run from outside: directories that go, kills, full disks, steps that never end."""

import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sophia_levanter.commands.checkpoints import main as checkpoints
from sophia_levanter.main import main
from tiny_runs import command, metrics, start


def remove(folder: Path) -> None:
    """At once, since a save may go on meanwhile."""
    shutil.rmtree(folder.rename(folder.with_name("going")))


@pytest.mark.parametrize(
    ("step", "rename"),
    [
        (2, False),
        (7, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, True), (7, False), (11, True)]),
    ],
)
def test_a_run_whose_directory_is_removed_fails_and_does_not_bring_it_back(
    config_file, tmp_path, after_step, capfd, step, rename
):
    run_dir = tmp_path / "run"
    after_step(step, lambda: run_dir.rename(tmp_path / "renamed") if rename else remove(run_dir))
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 1
    out, err = capfd.readouterr()
    (error,) = err.splitlines()
    assert error.startswith(f"error: {run_dir}/") and "removed" in error
    assert "done:" not in out
    assert not run_dir.exists()


@pytest.mark.slow
def test_checkpoints_that_are_removed_fail_the_next_save(config_file, tmp_path, after_step, capfd):
    run_dir = tmp_path / "run"
    after_step(7, lambda: remove(run_dir / "checkpoints"))
    assert main(["--config", str(config_file), "--trainer.run_dir", str(run_dir)]) == 1
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: {run_dir}/checkpoints/step-000000") and " was removed or renamed " in error
    assert not (run_dir / "checkpoints").exists()


# Processes of their own, that end in ways of their own.

KILLED = """
import os, signal, sys
from sophia_levanter.checkpoint import saving
from sophia_levanter.main import main
from sophia_levanter.tracking.jsonl import JsonLines
from sophia_levanter.training.evaluation import Evaluator

when, step, *arguments = sys.argv[1:]
step = int(step)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

log, evaluate, write, run = JsonLines.log, Evaluator.__call__, saving.write_arrays, saving._Save.run
seen = -1

def log_or_die(self, at, numbers):
    global seen
    log(self, at, numbers)
    seen = at
    if when == "step" and at >= step:
        die()

def evaluate_or_die(self, model, on_progress):
    def progress():
        on_progress()
        if when == "evaluation" and seen >= step:
            die()
    return evaluate(self, model, progress)

def write_or_die(folder, arrays, **options):
    if when == "save" and seen >= step:
        write(folder, arrays[::2], **options)
        die()
    return write(folder, arrays, **options)

def run_and_die(self):
    done = run(self)
    if when == "committed" and seen >= step:
        die()
    return done

JsonLines.log, Evaluator.__call__ = log_or_die, evaluate_or_die
saving.write_arrays, saving._Save.run = write_or_die, run_and_die
sys.exit(main(arguments))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_20_steps_and_resumed_the_losses_are_those_of_an_undisturbed_run(config_file, tmp_path):
    steps, rng = 200, random.Random(7)
    config = ["--config", config_file, "--trainer.num_train_steps", steps, "--trainer.evaluate_every", 6]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(command(*config, "--trainer.run_dir", whole), devices=8)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    wanted, wanted_losses = metrics(whole), metrics(whole, "validation/loss")

    at = sorted(rng.sample(range(1, steps - 8), 20))
    assert {step % 3 for step in at} == {0, 1, 2}, "on refreshing steps and others"
    for number, step in enumerate(at):
        when = ("step", "evaluation", "save", "committed")[number % 4]
        words = [sys.executable, "-c", KILLED, when, step, *config, "--trainer.run_dir", killed, "--resume", "auto"]
        process = start(words, devices=8)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, (when, step, out)
        found = metrics(killed)
        assert max(found) >= step - 1
        assert found == {done: wanted[done] for done in found}
    process = start(command("--resume", killed), devices=8)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert metrics(killed) == wanted
    assert metrics(killed, "validation/loss") == wanted_losses


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(finished_run, tmp_path, capfd):
    """A real one, in a namespace where this process may mount it. What is on it is copied to where there is room."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk, kept, run_dir = tmp_path / "disk", tmp_path / "kept", tmp_path / "run"
    disk.mkdir()
    if subprocess.run([*namespace, f"mount -t tmpfs none {disk}"], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a tmpfs")
    options = ["--trainer.checkpoint_dir", disk / "checkpoints", "--trainer.checkpoint_every", 2]
    options += ["--trainer.run_dir", run_dir, "--trainer.keep_checkpoints", 9]
    script = f"""
mount -t tmpfs -o size=3m none {disk} || exit 99
head -c 1900k /dev/zero > {disk}/ballast
{shlex.join(command("--config", finished_run.config_file, *options))}; echo "exit $?"
cp -a {disk}/checkpoints {kept}
"""
    finished = subprocess.run([*namespace, script], capture_output=True, text=True, timeout=300)
    assert finished.stdout.endswith("exit 1\n"), finished.stdout + finished.stderr
    (error,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written: leaf " in error and "No space left on device" in error
    assert "Traceback" not in finished.stderr
    assert checkpoints(["verify", str(kept)]) == 0
    assert main(["--resume", str(run_dir), "--trainer.checkpoint_dir", str(kept)]) == 0
    assert "resuming after step " in capfd.readouterr().out
    assert metrics(run_dir) == metrics(finished_run.path)


STUCK = """
import sys, time
from sophia_levanter.main import main
from sophia_levanter.tracking.jsonl import JsonLines
log = JsonLines.log
def never_ending(self, step, numbers):
    log(self, step, numbers)
    if step == 8:
        time.sleep(1000)
JsonLines.log = never_ending
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_is_stuck_is_ended_and_goes_on_when_started_again(config_file, tmp_path):
    options = ["--config", config_file, "--trainer.run_dir", tmp_path / "run", "--resume", "auto"]
    started = time.monotonic()
    process = start([sys.executable, "-c", STUCK, *options, "--trainer.step_timeout", 3], devices=8)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "took longer than 3 s (trainer.step_timeout); resume the run to continue from its last checkpoint" in out
    assert "never_ending" in out and "most recent call first" in out, "every thread's stack is shown"
    assert time.monotonic() - started < 100
    process = start(command("--resume", tmp_path / "run"), devices=8)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "resuming after step 6" in out
    assert list(metrics(tmp_path / "run")) == list(range(12))
