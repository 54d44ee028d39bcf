"""What code outside the package adds, each in a file of its own beside this one."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import yaml

from sophia_levanter.commands import compare, report
from sophia_levanter.config.command_line import load_config, parse_command_line
from sophia_levanter.errors import InputError
from sophia_levanter.main import main

SMALL_STEPS = ["--trainer.num_train_steps", "6", "--trainer.checkpoint_every", "3"]
PLUGINS = {
    "adan": ["--optimizer.type", "adan", "--optimizer.b3", "0.95"],
    "mean_fisher": ["--optimizer.type", "sophia_mean_fisher", "--optimizer.interval", "2"],
    "polynomial": ["--optimizer.schedule.type", "polynomial", "--optimizer.schedule.power", "3"],
    "gru": ["--model.type", "gru", "--model.embed_dim", "16", "--trainer.sample_tokens", "3"],
    "layer_norms": ["--trainer.metrics", "grad_norm_per_layer"],
    "perplexity": ["--trainer.callbacks", "perplexity"],
    "docstrings": ["--data.train", "docstrings:email"],
}
# All that go together in one run, and the others in a second: each has one optimizer and one model.
RUNS = [("adan", "polynomial", "layer_norms", "perplexity", "docstrings"), ("mean_fisher", "gru")]


@pytest.fixture(autouse=True)
def _on_the_path(plugin_folder):
    """All plug-ins can be imported."""


def options_of(*plugins):
    return ["--plugins", ",".join(plugins), *(word for plugin in plugins for word in PLUGINS[plugin]), *SMALL_STEPS]


@pytest.mark.parametrize("plugins", RUNS, ids=",".join)
def test_a_run_and_its_resume(plugins, config_file, tmp_path, monkeypatch, capsys):
    # Pictures of registered metrics are drawn in tests/studies/test_plots.py.
    monkeypatch.setattr("sophia_levanter.studies.page.png", lambda *_: b"")
    monkeypatch.setattr("sophia_levanter.studies.page.svg", lambda *_: "data:")
    run_dir = tmp_path / "run"
    options = ["--config", str(config_file), *options_of(*plugins)]
    assert main([*options, "--trainer.run_dir", str(run_dir)]) == 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["plugins"] == list(plugins)
    # The plug-ins are in the run's configuration. From the checkpoint before the last it goes on with the same steps.
    shutil.rmtree(run_dir / "checkpoints/step-00000006")
    assert main(["--resume", str(run_dir)]) == 0
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert report.main([str(run_dir), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(PLUGINS[plugin][1] in page for plugin in plugins)
    printed = capsys.readouterr().out
    if "layer_norms" in plugins:
        norms = [[line[f"grad_norm_per_layer/layer_{i}"] for i in range(2)] for line in metrics[:2]]
        wholes = [line["train/grad_norm"] for line in metrics[:2]]
        assert all(0 < math.hypot(*parts) < whole for parts, whole in zip(norms, wholes, strict=True))
        last = metrics[-1]
        assert last["perplexity/validation"] == pytest.approx(math.exp(last["validation/loss"]))
        # At the end of the run and of its resume.
        assert printed.count("\ngrad_norm_per_layer: layer_0 ") == printed.count("\nperplexity: validation ") == 2
        assert "From lightest to darkest: layer_0, layer_1." in page
        assert {f"report-metric-{name}.png" for name in ("grad_norm_per_layer", "perplexity")} <= {
            path.name for path in tmp_path.iterdir()
        }


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["mean_fisher", "gru"])
def test_plan_knows_them(plugin, config_file):
    options = options_of(plugin)
    words = [sys.executable, "-m", "sophia_levanter.commands.plan", "--config", str(config_file), *options]
    planned = subprocess.run(words, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "FLOPs" in planned.stdout


@pytest.mark.slow
def test_a_study_of_them(config_file, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "config": [str(config_file)],
                "tokens": [1536],
                "evaluations": 2,
                "settings": {
                    "plugins": ["adan", "layer_norms", "docstrings"],
                    "trainer": {"metrics": ["grad_norm_per_layer"]},
                    "data": {"train": "docstrings:email"},
                },
                "arms": {"sophia": {"settings": {}}, "adan": {"settings": {"optimizer": {"type": "adan"}}}},
            }
        )
    )
    assert compare.main(["--config", str(study), "--out", str(tmp_path / "out")]) == 0
    assert "adan" in (tmp_path / "out" / "report.md").read_text()


def test_help_and_messages_name_them(config_file):
    text = parse_command_line(["--plugins", "adan", "--help"]).help
    assert "optimizer, with --optimizer.type adan: Adan" in text
    assert "--optimizer.b3 NUMBER (0.99)" in text
    assert parse_command_line(["--help", "--plugins=adan"]).help == text
    argv = ["--config", str(config_file), "--plugins", "adan", "--optimizer.type", "adan"]
    with pytest.raises(InputError, match=r"optimizer\.b3 is 2\.0; it must be in \[0, 1\)"):
        parse_command_line([*argv, "--optimizer.b3", "2"])
    with pytest.raises(InputError, match=r"unknown option '--optimizer\.b33'; did you mean --optimizer\.b3\?"):
        parse_command_line([*argv, "--optimizer.b33", "2"])
    chosen = ["--trainer.metrics", "grad_norm_per_laver"]
    with pytest.raises(
        InputError, match=r"^trainer\.metrics contains 'grad_norm_per_laver', .*; use --plugins to register it$"
    ):
        parse_command_line([*argv, *chosen])
    with pytest.raises(InputError, match=r"'grad_norm_per_laver', .* did you mean grad_norm_per_layer\?$"):
        parse_command_line([*argv, "--plugins", "layer_norms", *chosen])


def test_several_are_joined(config_file, tmp_path):
    above = tmp_path / "above.yaml"
    above.write_text(f"defaults: [{config_file}]\nplugins: [gru]\noptimizer: {{schedule: polynomial}}\n")
    argv = ["--config", str(above), "--plugins", "polynomial", "--plugins=adan"]
    assert parse_command_line(argv).config.plugins == ("gru", "polynomial", "adan")


HEADER = """
from dataclasses import dataclass
from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.config.settings import setting
"""
METRIC = "from sophia_levanter.config.registries import register_metric\n@register_metric({0!r})\ndef {0}(step): {1}"
BROKEN = {
    "absent": (None, "plugins: module absent not found; add its directory to PYTHONPATH"),
    "needs": ("import no_such_package", "plugins: needs requires no_such_package, which is not installed"),
    "fails": ("1 / 0", "plugins: fails cannot be imported: ZeroDivisionError: division by zero"),
    "twice": (
        HEADER + '@OptimizerConfig.register_subclass("adamw")\n@dataclass(frozen=True)\nclass A(OptimizerConfig): ...',
        "plugins: twice cannot be imported: ValueError: Cannot register",
    ),
    "strange": (
        HEADER
        + '@OptimizerConfig.register_subclass("strange")\n@dataclass(frozen=True)\nclass A(OptimizerConfig):\n'
        + '    x: complex = setting(1j, "a number")\n',
        "optimizer.x in A has type <class 'complex'>; a setting must be a bool, int, float or str",
    ),
    "empty": (
        HEADER + '@OptimizerConfig.register_subclass("empty")\n@dataclass(frozen=True)\nclass A(OptimizerConfig): ...',
        "optimizer: A does not define build()",
    ),
    "lacks": (
        HEADER
        + '@OptimizerConfig.register_subclass("lacks")\n@dataclass(frozen=True)\nclass A(OptimizerConfig):\n'
        + "    def build(self, num_train_steps): return object()\n",
        "optimizer: object does not define init, update, refresh_due",
    ),
    "raw": (
        HEADER
        + '@OptimizerConfig.register_subclass("raw")\n@dataclass(frozen=True)\nclass A(OptimizerConfig):\n'
        + "    def build(self, num_train_steps):\n        import optax\n        return optax.sgd(0.1)\n",
        "optimizer: A.build() returns an optax transformation; subclass sophia_levanter.optim.OptaxOptimizer",
    ),
    "unbuilt": (
        HEADER
        + '@OptimizerConfig.register_subclass("unbuilt")\n@dataclass(frozen=True)\nclass A(OptimizerConfig):\n'
        + "    def build(self): return 1\n",
        "optimizer: A.build() failed: TypeError: A.build() takes 1 positional argument but 2 were given",
    ),
    "with.py": (None, "plugins: 'with.py' is not a module name; for my_module.py, use my_module"),
    "train": (
        METRIC.format("train", "pass"),
        "plugins: train cannot be imported: ValueError: metric name 'train' is reserved",
    ),
    "vector": (
        METRIC.format("vector", "return {'w': step.grads.wte.weight.array[0]}"),
        "trainer.metrics: vector returns an array of shape (16,) for 'w'; it must be a scalar",
    ),
    "raises": (METRIC.format("raises", "return {'a': step.loss}"), "trainer.metrics: raises failed: AttributeError: "),
    "textless": (
        "from sophia_levanter.data.sources import DataSource, TextSource\n"
        '@DataSource.register_subclass("textless")\nclass A(TextSource):\n    def documents(self): return ["text"]\n',
        "data.train: A does not define identity()",
    ),
    "counting": (
        "from sophia_levanter.data.sources import DataSource, TextSource\n"
        '@DataSource.register_subclass("counting")\nclass A(TextSource):\n    def documents(self): return range(5)\n'
        "    def identity(self): return 5\n",
        "data.train: counting:x, document 1 is a number; A.documents() must yield strings",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_line(name, plugin_folder, config_file, tmp_path, capsys):
    code, message = BROKEN[name]
    if code is not None:
        (plugin_folder / f"{name}.py").write_text(code)
    chosen = ["--optimizer.type", name] if name in ("strange", "empty", "lacks", "raw", "unbuilt") else []
    chosen = ["--trainer.metrics", name] if name in ("vector", "raises") else chosen
    chosen = ["--data.train", f"{name}:x"] if name in ("textless", "counting") else chosen
    run_dir = tmp_path / "run"
    argv = ["--config", str(config_file), "--plugins", name, *chosen, "--trainer.run_dir", str(run_dir)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not run_dir.exists()


def test_a_run_without_its_plugin_is_one_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("plugins: [gone]\noptimizer: {type: gone}\n")
    assert main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.yaml: plugins: module gone not found;")


def test_a_plain_field_is_a_setting_without_bounds(plugin_folder, config_file):
    code = HEADER + '@OptimizerConfig.register_subclass("plain")\n@dataclass(frozen=True)\nclass A(OptimizerConfig):\n'
    (plugin_folder / "plain.py").write_text(code + "    x: int = 3\n")
    assert "--optimizer.x INT (3)" in parse_command_line(["--plugins", "plain", "--help"]).help
    argv = ["--config", str(config_file), "--plugins", "plain", "--optimizer.type", "plain", "--optimizer.x", "-7"]
    assert parse_command_line(argv).config.optimizer.x == -7


def test_names_of_modules_only(tmp_path):
    (tmp_path / "a.yaml").write_text("plugins: 7\n")
    with pytest.raises(InputError, match="plugins is 7; it must be a list of module names"):
        load_config(tmp_path / "a.yaml")
