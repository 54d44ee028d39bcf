"""Traces of training steps, read back as TensorBoard reads them."""

from unittest.mock import MagicMock

import jax
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.config.command_line import load_config
from sophia_levanter.main import main
from sophia_levanter.training.callbacks import Profiling


def traced_steps(directory):
    """The numbers of the steps in each trace under a directory, the oldest first."""
    return [
        sorted(
            {
                dict(event.stats)["step_num"]
                for plane in jax.profiler.ProfileData.from_file(str(path)).planes
                for line in plane.lines
                for event in line.events
                if event.name == "train"
            }
        )
        for path in sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    ]


def test_a_run_and_its_resume_trace_the_steps_asked_for(config_file, tmp_path, capsys, stop_after):
    run_dir = tmp_path / "run"
    command = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--trainer.profile_steps", "5:8"]
    stop_after(8)
    assert main(command) == 130
    assert f"profile: tensorboard --logdir {run_dir}/profile" in capsys.readouterr().out
    (saved,) = set(checkpoint.steps(run_dir / "checkpoints")) - {6}
    assert saved in (9, 10)
    assert main([*command, "--resume", "auto", "--trainer.profile_steps", "8:12"]) == 0
    assert sorted(traced_steps(run_dir / "profile")) == [[5, 6, 7], list(range(saved, 12))]


def test_a_trace_is_written_when_a_run_ends_within_it(tmp_path):
    console = MagicMock()
    profiling = Profiling(range(2, 5), tmp_path, console)
    assert [profiling.is_due(step) for step in range(6)] == [False, False, True, True, True, False]
    profiling.before_step(2)
    with jax.profiler.StepTraceAnnotation("train", step_num=2):
        jax.numpy.ones(3).block_until_ready()
    assert [profiling.is_due(step) for step in range(2, 6)] == [False, False, False, True]
    for _ in range(2):
        profiling.on_end()
    console.line.assert_called_once_with(f"profile: tensorboard --logdir {tmp_path}")
    assert traced_steps(tmp_path) == [[2]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("10", "trainer.profile_steps is '10'; it must be FIRST:END with FIRST < END, such as 10:15"),
        ("", "trainer.profile_steps is empty; omit it to use the default"),
        ("7:7", "trainer.profile_steps is '7:7'; it must be"),
        ("-3:2", "trainer.profile_steps is '-3:2'; it must be"),
        ("1:2:3", "trainer.profile_steps is '1:2:3'; it must be"),
        ("10:15", "trainer.profile_steps is 10:15, but trainer.num_train_steps is 12"),
    ],
)
def test_bad_steps(given, message, config_file, capsys):
    assert main(["--config", str(config_file), f"--trainer.profile_steps={given}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_file_need_not_quote_what_yaml_could_take_for_a_time(config_file):
    config_file.write_text(config_file.read_text() + "  profile_steps: 10:12\n")
    assert load_config(config_file).trainer.profiled_steps == range(10, 12)
