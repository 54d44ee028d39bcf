"""What configuration files mean, and what they cannot say."""

import pytest
from refusals import TYPES, load_error

from sophia_levanter.config import TrainConfig, build
from sophia_levanter.config.baselines import AdamWConfig, LionConfig
from sophia_levanter.config.command_line import dump_config, load_config
from sophia_levanter.config.data import DataConfig, MixturePart
from sophia_levanter.config.model import Gpt2Config, LlamaConfig
from sophia_levanter.config.optimizer import SophiaGConfig, SophiaHConfig
from sophia_levanter.config.run import TrackingConfig
from sophia_levanter.config.trainer import BatchSizeChange, TrainerConfig
from sophia_levanter.errors import InputError


@pytest.mark.parametrize("text", ["", "# nothing\n", "optimizer:\nmodel: {}\n", "defaults: []\n"])
def test_empty_file_is_all_defaults(write, text):
    assert load_config(write(text)) == TrainConfig()


def test_file_sets_fields_of_every_section(write):
    text = """
model: {num_layers: 2, use_bias: true}
optimizer: {type: lion, learning_rate: 6e-5, final_learning_rate: 0, weight_decay: 1}
data: {train: "*.txt", validation: null}
trainer: {microbatch_size: 4, batch_size: 8, max_grad_norm: null}
"""
    config = load_config(write(text))
    assert config.model == Gpt2Config(num_layers=2, use_bias=True)
    assert config.optimizer == LionConfig(learning_rate=6e-5, final_learning_rate=0.0, weight_decay=1.0)
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.data == DataConfig(train="*.txt")
    assert config.trainer == TrainerConfig(microbatch_size=4, batch_size=8, max_grad_norm=None)


@pytest.mark.parametrize("text", ["yes", "off", "0123", "12:30", "2024-01-02", "1_000", ".inf", "null-ish.txt"])
def test_yaml_words_that_yaml_1_1_would_change_stay_strings(write, text):
    assert load_config(write(f"data: {{text_field: {text}}}")).data.text_field == text


@pytest.mark.parametrize(
    ("text", "separator"), [(r'"\n\n"', "\n\n"), (r'"\u00e9\x1e "', "\u00e9\x1e "), ("null", None)]
)
def test_separators(write, text, separator):
    config = load_config(write(f"data: {{document_separator: {text}}}"))
    assert config.data.document_separator == separator
    assert load_config(write(dump_config(config))) == config
    assert load_config(write(""), [("data.document_separator", separator or "null")]).data == config.data


def test_defaults_merge_deeply_in_order(write):
    write("model: {num_layers: 1, seq_len: 8}\noptimizer: {rho: 0.1, interval: 3}\n", "base/first.yaml")
    write("defaults: [first.yaml]\nmodel: {num_layers: 2}\n", "base/second.yaml")
    write("optimizer: {rho: 0.2}\n", "base/third.yaml")
    path = write("defaults: [base/second.yaml, base/third.yaml]\nmodel: {num_heads: 4}\n")
    config = load_config(path)
    assert config.model == Gpt2Config(num_layers=2, num_heads=4, seq_len=8)
    assert config.optimizer == SophiaGConfig(rho=0.2, interval=3)


def test_another_type_keeps_what_both_have(write):
    path = write("model: {num_layers: 2, num_heads: 2, embed_dim: 32, mlp_ratio: 2}\noptimizer: {rho: 0.2}\n")
    config = load_config(path, [("model.type", "llama"), ("optimizer.type", "sophia_h")])
    assert config.model == LlamaConfig(num_layers=2, num_heads=2, embed_dim=32)
    assert config.optimizer == SophiaHConfig()


def test_file_takes_precedence_over_its_defaults_wherever_they_stand(write):
    write("trainer: {seed: 1}", "base.yaml")
    assert load_config(write("trainer: {seed: 2}\ndefaults: [base.yaml]")).trainer.seed == 2


def test_one_file_may_be_included_twice(write):
    write("trainer: {seed: 1}", "base.yaml")
    write("defaults: [base.yaml]", "a.yaml")
    assert load_config(write("defaults: [base.yaml, a.yaml]")).trainer.seed == 1


def test_defaults_in_a_circle(write):
    write("defaults: [b.yaml]", "a.yaml")
    write("defaults: [a.yaml]", "b.yaml")
    message = load_error(write("defaults: [a.yaml]"))
    assert "b.yaml: defaults form a cycle: a.yaml -> b.yaml -> a.yaml" in message


def test_missing_files(write, tmp_path):
    assert load_error(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: file not found"
    path = write("defaults: [no.yaml]")
    assert load_error(path) == f"{tmp_path}/no.yaml: file not found; it is listed under defaults in {path}"
    assert "cannot be read" in load_error(tmp_path)


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\xfe")
    assert load_error(path) == f"{path} is not valid UTF-8"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model:\n  num_layers: [1", "at line 2"),
        ("model:\n  num_layers: 1\n  seq_len: 2\n  num_layers: 3", "at line 4: duplicate key 'num_layers'"),
        ("data:\n  train: *.txt", "at line 2"),
        ("a: &x {b: 1}\nc: *x", "at line 1: anchors and aliases are not allowed"),
        ("data: !!python/object/apply:os.getcwd []", "the tag tag:yaml.org,2002:python/object/apply:os.getcwd is"),
        ("--- 1\n--- 2", "expected a single document"),
        ("model: \x00", "not valid YAML"),
        ("trainer: {seed: " + "1" * 5000 + "}", "not valid YAML"),
        ("- model", "contains a list; it must contain a mapping"),
        ("model", "contains a str; it must contain a mapping"),
        ("defaults: base.yaml", "defaults is 'base.yaml'; it must be a list of file names"),
        ("defaults: [{a: 1}]", "it must be a list of file names"),
        ("optimizer.rho: 0.03", "key 'optimizer.rho' contains a dot"),
        ("<<: {model: {}}", "unknown key '<<.model'"),
    ],
)
def test_files_that_are_not_strict_yaml(write, text, problem):
    path = write(text)
    message = load_error(path)
    assert message.startswith(str(path))
    assert problem in message


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("optimizer: {roh: 1}", "optimizer.roh", "did you mean optimizer.rho?"),
        ("optimiser: {rho: 1}", "optimiser.rho", "did you mean optimizer.rho?"),
        ("trainer: {learning_rate: 1}", "trainer.learning_rate", "did you mean optimizer.learning_rate?"),
        ("seq_len: 3", "seq_len", "did you mean model.seq_len?"),
        ("modle: 3", "modle", "did you mean model?"),
        ("model: {zzz: 1}", "model.zzz", "valid fields for model (type gpt2) are type, seq_len"),
        ("zzz: {qqq: 1}", "zzz.qqq", "valid sections are model, optimizer, data, trainer"),
        ("7: 1", "7", "valid sections are"),
        ('"a\\nb": 1', "a\\nb", "valid sections are"),
        (
            "optimizer: {type: adamw, rho: 1}",
            "optimizer.rho",
            "valid fields for optimizer (type adamw) are type, learning_rate, final_fraction, "
            "final_learning_rate, warmup, weight_decay, momentum_dtype, groups, hyperball, "
            "cautious_weight_decay, b1, b2, eps, nesterov, cautious, schedule",
        ),
    ],
)
def test_unknown_key_names_the_nearest(write, text, key, suggestion):
    path = write(text)
    message = load_error(path)
    assert message.startswith(f"{path}: unknown key '{key}'; {suggestion}")


def test_unknown_key_names_the_file_it_stands_in(write):
    base = write("optimizer: {roh: 1}", "base.yaml")
    assert load_error(write("defaults: [base.yaml]\noptimizer: {rho: 1}")).startswith(f"{base}: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("trainer: {num_train_steps: abc}", "trainer.num_train_steps is 'abc'; it must be an integer"),
        ("trainer: {num_train_steps: 1e5}", "trainer.num_train_steps is 100000.0; it must be an integer"),
        ("trainer: {num_train_steps: true}", "trainer.num_train_steps is true; it must be an integer"),
        ("trainer: {num_train_steps: null}", "trainer.num_train_steps is null; it must be an integer"),
        ("trainer: {num_train_steps: {a: 1}}", "trainer.num_train_steps is a mapping; it must be an integer"),
        ("trainer: {num_train_steps: {}}", "trainer.num_train_steps is a mapping; it must be an integer"),
        ("trainer: {microbatch_size: x}", "trainer.microbatch_size is 'x'; it must be an integer or null"),
        ("optimizer: {rho: true}", "optimizer.rho is true; it must be a finite number or auto"),
        ("optimizer: {rho: 1e999}", "optimizer.rho is inf; it must be a finite number or auto"),
        ("optimizer: {rho: 1" + "0" * 400 + "}", "optimizer.rho is inf; it must be a finite number or auto"),
        ("model: {use_bias: yes}", "model.use_bias is 'yes'; it must be true or false"),
        ("data: {text_field: 12}", "data.text_field is 12; it must be a string; quote it"),
        ("data: {validation: [a.txt]}", "data.validation is a list; it must be a string or null"),
        ("data: {validation: 1.5}", "data.validation is 1.5; it must be a string or null; quote it"),
        ("model: 3", "model is 3; it must be a mapping of fields"),
        (
            "optimizer: {schedule: cosin}",
            "optimizer.schedule.type is 'cosin'; it must be one of cosine, linear, constant, wsd, inverse_sqrt",
        ),
        ("optimizer: adamw2", f"optimizer.type is 'adamw2'; {TYPES}"),
        ("optimizer: {type: [a]}", f"optimizer.type is a list; {TYPES}"),
    ],
)
def test_wrong_types(write, text, problem):
    path = write(text)
    assert load_error(path) == f"{path}: {problem}"


def test_errors_of_a_dataclass_pass_unchanged(write):
    with pytest.raises(InputError) as direct:
        Gpt2Config(num_heads=7)
    assert load_error(write("model: {num_heads: 7}")) == str(direct.value)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(model=LlamaConfig()),
        TrainConfig(optimizer=SophiaHConfig(eps=1e-30, probe="gaussian", bias_correct_momentum=True)),
        TrainConfig(optimizer=AdamWConfig(learning_rate=1e16)),
        TrainConfig(optimizer=LionConfig(learning_rate=1 / 3)),
        TrainConfig(trainer=TrainerConfig(run_dir="null", microbatch_size=8, max_grad_norm=None)),
        TrainConfig(tracking=TrackingConfig("offline", wandb_group=None)),
        *(
            TrainConfig(data=DataConfig(train=text))
            for text in ("6e-4", "0123", "yes", "true", "~", "*.txt", "!x", "a: b", "# c", "two\nlines", "ä €", " x ")
        ),
    ],
)
def test_dumped_config_is_read_back(write, config):
    assert load_config(write(dump_config(config))) == config


MIXTURE = """\
data:
  train:
    - {source: python_stdlib, weight: 3}
    - {source: other.txt}
  validation: other.txt
"""


def test_a_mixture_of_texts(write) -> None:
    config = load_config(write(MIXTURE))
    assert config.data.train == (MixturePart("python_stdlib", 3.0), MixturePart("other.txt", 1.0))
    again = write(dump_config(config))
    assert load_config(again) == config
    assert load_config(again, [("data.train", "one.txt")]).data.train == "one.txt"


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("[other.txt]", "data.train[0] is 'other.txt'; it must be a mapping of fields"),
        ("[{source: a, wieght: 2}]", "data.train[0].wieght is unknown; valid fields are source, weight"),
        ("[{weight: 2}]", "data.train[0].source is missing; valid fields are source, weight"),
        ("[{source: a, weight: x}]", "data.train[0].weight is 'x'; it must be a finite number"),
        ("[]", "data.train is empty"),
        ("{source: a}", "data.train is a mapping; it must be a string"),
    ],
)
def test_mixtures_that_are_none(write, train: str, expected: str) -> None:
    assert expected in load_error(write(f"data:\n  train: {train}\n  validation: b.txt\n"))


def test_changes_of_the_batch_size(write) -> None:
    config = load_config(write("trainer:\n  batch_size_changes:\n    - {step: 10, batch_size: 960}\n"))
    assert config.trainer.batch_size_changes == (BatchSizeChange(10, 960),)
    again = write(dump_config(config))
    assert load_config(again) == config
    on_top = load_config(again, [("trainer.batch_size_changes", "[{step: 20, batch_size: 5}]")])
    assert on_top.trainer.batch_size_changes == (BatchSizeChange(20, 5),)
    assert load_config(again, [("trainer.batch_size_changes", "[]")]).trainer.batch_size_changes == ()
    assert [config.trainer.at_step(step).batch_size for step in (0, 9, 10, 11)] == [480, 480, 960, 960]


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("batch_size_changes: 5", "trainer.batch_size_changes is 5; it must be a list"),
        ("batch_size_changes: [{step: 0, batch_size: 2}]", "batch_size_changes.step is 0; it must be at least 1"),
        (
            "batch_size_changes: [{step: 2, batch_size: 4}, {step: 2, batch_size: 8}]",
            "batch_size_changes has steps [2, 2]; steps must be strictly increasing",
        ),
        (
            "batch_size_changes: [{step: 100000, batch_size: 4}]",
            "batch_size_changes contains step 100000, which is never reached",
        ),
        (
            "{batch_size: 8, microbatch_size: 4, batch_size_changes: [{step: 2, batch_size: 6}]}",
            "trainer.microbatch_size 4 does not divide trainer.batch_size 6",
        ),
    ],
)
def test_changes_of_the_batch_size_that_are_none(write, trainer: str, expected: str) -> None:
    assert expected in load_error(write(f"trainer:\n  {trainer}"))


def test_a_mixture_without_a_validation_text(write) -> None:
    message = load_error(write(MIXTURE.replace("  validation: other.txt\n", "")))
    assert message.startswith("data.validation is missing; it is required if data.train is a mixture")


def test_a_former_name_works_and_is_reported_once(write, capfd, monkeypatch):
    monkeypatch.setattr(build, "_warned", set())
    path = write("optimizer: {warmup_steps: 7}")
    for _ in range(2):
        assert load_config(path).optimizer.warmup == 7
    assert (
        capfd.readouterr().err
        == f"WARNING: {path}: optimizer.warmup_steps is deprecated; use optimizer.warmup instead\n"
    )
    assert load_config(path, [("optimizer.warmup", "0.5")]).optimizer.warmup == 0.5
    assert load_config(path, [("optimizer.warmup_steps", "9")]).optimizer.warmup == 9
    assert load_error(write("optimizer: {warmup_steps: 7, warmup: 9}")) == (
        f"{path}: optimizer.warmup_steps and optimizer.warmup are the same setting; specify only optimizer.warmup"
    )
