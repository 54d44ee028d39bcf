"""Signals to a run: it saves and says so, and its exit status tells whether to run it again."""

import itertools
import signal
import subprocess
import sys
import time

import pytest

from sophia_levanter import checkpoint
from sophia_levanter.main import main
from tiny_runs import command, metrics, start, wait_for_step

# Lion compiles one program. Only a signal ends the run, and the only checkpoint is the one saved then.
ENDLESS = ["--optimizer.type", "lion", "--trainer.num_train_steps", 100_000]
ENDLESS += ["--trainer.evaluate_every", 100_000, "--trainer.checkpoint_every", 100_000]


def test_sigterm_means_run_me_again_and_auto_does(config_file, tmp_path, capfd, stop_after):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_dir = tmp_path / "run"
    again = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--resume", "auto"]
    stop_after(4, signal.SIGTERM)
    assert main(again) == 75
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before, "the caller's handlers"
    assert main(again) == 0
    assert list(metrics(run_dir)) == list(range(12))
    assert "resuming after step" in capfd.readouterr().out
    # The same command again has nothing left to do and succeeds.
    assert main(again) == 0
    assert "all 12 steps are done" in capfd.readouterr().out


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_exits_130(config_file, tmp_path):
    run_dir = tmp_path / "run"
    process = start(command("--config", config_file, "--trainer.run_dir", run_dir, *ENDLESS))
    wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    (step,) = checkpoint.steps(run_dir / "checkpoints")
    assert "stop requested; the run will save and stop after the current step" in out
    assert f"SIGINT: stopped after step {step}, which was saved" in out
    assert "Traceback" not in out


def test_sigterm_before_training_is_not_swallowed(config_file, tmp_path):
    """Wherever it comes: here in a callback of the garbage collector, where an exception is only printed."""
    program = """
import gc, signal, sys
from sophia_levanter.main import main
from sophia_levanter.run import run
def collect(*arguments, **options):
    gc.callbacks.append(lambda *arguments: signal.raise_signal(signal.SIGTERM))
    gc.collect()
    print("went on")
run.train = collect
sys.exit(main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", program, "--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 75
    assert result.stdout == ""
    assert result.stderr == "SIGTERM: stopped outside training; run the command again to continue\n"


@pytest.mark.parametrize(
    "pause", [pytest.param(0.005, marks=pytest.mark.slow), 0.05], ids=["every 5 ms", "every 50 ms, console script"]
)
def test_signals_until_the_exit_do_not_change_how_a_run_ends(pause, config_file, tmp_path):
    run_dir = tmp_path / "run"
    words = command("--config", config_file, "--trainer.run_dir", run_dir, *ENDLESS)
    if pause == 0.05:
        words[1:3] = ["-c", "import sys; from sophia_levanter.cli import main; sys.exit(main())", "train"]
    process = start(words)
    wait_for_step(run_dir, 3, process)
    for number in itertools.cycle([signal.SIGTERM, signal.SIGINT, signal.SIGINT]):
        if process.poll() is not None:
            break
        process.send_signal(number)
        time.sleep(pause)
    out, _ = process.communicate()
    assert process.returncode == 75, out
    (step,) = checkpoint.steps(run_dir / "checkpoints")
    assert f"SIGTERM: stopped after step {step}, which was saved" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]], ids=["SIGINT", "SIGTERM first"])
def test_signals_before_training_end_it_with_their_status(numbers, config_file, tmp_path):
    process = start(command("--config", config_file, "--trainer.run_dir", tmp_path / "run"))
    process.stdout.readline()
    for number in itertools.cycle(numbers):
        if process.poll() is not None:
            break
        process.send_signal(number)
        time.sleep(0.005)
    out, _ = process.communicate()
    assert process.returncode == (75 if numbers[0] == signal.SIGTERM else 130), out
    assert "Traceback" not in out
