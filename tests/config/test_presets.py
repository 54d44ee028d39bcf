import dataclasses
import functools
from pathlib import Path

import jax
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, AdEMAMixConfig, LionConfig, MuonConfig, SoapConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import Gpt2Config, LlamaConfig
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig, SophiaHConfig
from sophia_levanter.config.schedule import CosineSchedule
from sophia_levanter.config.settings import steps_of
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import abstract_model

CONFIG_DIR = Path(__file__).parents[2] / "config"
FILES = sorted(CONFIG_DIR.glob("*.yaml"))
TYPES = {
    "sophia": SophiaGConfig,
    "sophia_h": SophiaHConfig,
    "sophia_kronecker": SophiaGConfig,
    "adamw": AdamWConfig,
    "lion": LionConfig,
}

# layers, heads, embed
SHAPES = {
    "nano": (4, 8, 128),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 24, 1536),
    "125m": (12, 12, 768),
    "1b": (16, 32, 2048),
}
GPT2_SIZES = ("nano", "small", "medium", "large", "xl")
# Per size and optimizer: learning rate, final learning rate, weight decay and, for Sophia, rho.
PUBLISHED = {
    ("small", "adamw"): (6e-4, 3e-5, 0.1),
    ("small", "lion"): (1e-4, 0.05 * 1e-4, 0.1),
    ("small", "sophia"): (6e-4, 1.5e-5, 0.2, 0.05),
    ("small", "sophia_h"): (6e-4, 0.05 * 6e-4, 0.2, 0.01),
    ("medium", "adamw"): (3e-4, 6e-5, 0.1),
    ("medium", "lion"): (1e-4, 0.05 * 1e-4, 0.1),
    ("medium", "sophia"): (7e-4, 1e-5, 0.2, 0.08),
    ("medium", "sophia_h"): (4e-4, 0.05 * 4e-4, 0.2, 0.01),
    ("large", "adamw"): (2e-4, 1e-5, 0.1),
    ("large", "lion"): (8e-5, 0.05 * 8e-5, 0.1),
    ("large", "sophia"): (3e-4, 1e-5, 0.2, 0.05),
    ("large", "sophia_h"): (3e-4, 0.05 * 3e-4, 0.2, 0.01),
    ("xl", "adamw"): (1.2e-4, 0.05 * 1.2e-4, 0.1),
    ("xl", "sophia"): (2.5e-4, 0.05 * 2.5e-4, 0.15, 0.04),
    ("xl", "sophia_h"): (1.2e-4, 0.05 * 1.2e-4, 0.15, 0.01),
}


loaded = functools.cache(load_config)  # configurations are frozen


def named(size: str, optimizer: str) -> TrainConfig:
    return loaded(CONFIG_DIR / f"gpt2_{size}_{optimizer}.yaml")


def test_every_configuration_is_there():
    not_there = {"gpt2_xl_lion", *(f"gpt2_{size}_sophia_kronecker" for size in ("medium", "large", "xl"))}
    expected = {f"gpt2_{size}_{optimizer}" for size in GPT2_SIZES for optimizer in TYPES} - not_there
    expected |= {f"llama_{size}_{name}" for size in ("125m", "1b") for name in ("adamw", "sophia", "sophia_kronecker")}
    assert expected | {"llama_nano_adamw", "llama_nano_sophia_kronecker"} == {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_configuration(file):
    config = loaded(file)
    model, size, optimizer = file.stem.split("_", 2)
    assert type(config.optimizer) is TYPES[optimizer]
    assert (config.model.num_layers, config.model.num_heads, config.model.embed_dim) == SHAPES[size]
    assert config.model.dropout == 0
    if model == "gpt2":
        assert (config.model.use_bias, config.model.scale_attn_by_inverse_layer_idx) == (False, True)
    else:
        assert (type(config.model), config.model.tie_embeddings) == (LlamaConfig, True)
    assert getattr(config.optimizer, "basis", None) == {"sophia_kronecker": "kronecker"}.get(
        optimizer, "parameters" if optimizer.startswith("sophia") else None
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2_small", 124_373_760),
        ("gpt2_large", 773_582_080),
        ("llama_nano", 7_226_496),
        ("llama_125m", 123_587_328),
        ("llama_1b", 1_076_168_704),
    ],
)
def test_parameter_count(name, count):
    """With 50,304 rows in the embedding."""
    model = abstract_model(loaded(CONFIG_DIR / f"{name}_adamw.yaml").model, 50304)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


@pytest.mark.parametrize(("size", "optimizer"), PUBLISHED)
def test_published_figures(size, optimizer):
    config = named(size, optimizer)
    found = config.optimizer
    figures = [found.learning_rate, found.last_learning_rate, found.weight_decay]
    if isinstance(found, SophiaGConfig | SophiaHConfig):
        figures.append(found.rho)
        assert (found.b1, found.b2, found.eps, found.interval) == (0.965, 0.99, 1e-12, 10)
        assert not found.bias_correct_momentum
        assert not found.bias_correct_curvature
    assert figures == pytest.approx(PUBLISHED[size, optimizer], rel=1e-12)
    trainer = config.trainer
    assert (found.schedule, steps_of(found.warmup, trainer.num_train_steps)) == (CosineSchedule(), 2000)
    assert trainer.num_train_steps == (200_000 if size == "xl" else 100_000)
    assert (trainer.batch_size, trainer.max_grad_norm, trainer.compute_dtype) == (480, 1.0, "bfloat16")
    assert (config.model.seq_len, config.data.tokenizer) == (1024, "gpt2")


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
def test_published_coefficients_and_curvature_batches(size):
    adamw = named(size, "adamw").optimizer
    assert (adamw.b1, adamw.b2, adamw.eps) == (0.9, 0.95, 1e-8)
    if size != "xl":
        lion = named(size, "lion").optimizer
        assert (lion.b1, lion.b2) == (0.95, 0.98)
    assert named(size, "sophia_h").optimizer.probe == "gaussian"
    for optimizer, windows in (("sophia", 240), ("sophia_h", 32)):
        config = named(size, optimizer)
        assert config.optimizer.curvature_batch_fraction * config.trainer.num_microbatches == pytest.approx(
            windows / config.trainer.microbatch_size, rel=1e-12
        )
        assert windows % config.trainer.microbatch_size == 0


def test_nano_runs_need_nothing_but_python():
    for optimizer in TYPES:
        config = named("nano", optimizer)
        assert (config.data.train, config.data.validation, config.data.tokenizer) == ("python_stdlib", None, "bytes")
        assert config.trainer.compute_dtype == "float32"
        assert config.trainer.evaluate_every < config.trainer.num_train_steps


def test_baselines_without_a_size(tmp_path):
    def load(name):
        path = tmp_path / f"{name}.yaml"
        files = [str(CONFIG_DIR / "base" / f"{file}.yaml") for file in ("gpt2_nano", name)]
        path.write_text(f"defaults: {files}\n")
        return load_config(path)

    adamw, nadamw, muon, soap, ademamix = (load(name) for name in ("adamw", "nadamw", "muon", "soap", "ademamix"))
    assert nadamw.optimizer == dataclasses.replace(adamw.optimizer, nesterov=True)
    shared = {field.name: getattr(adamw.optimizer, field.name) for field in dataclasses.fields(OptimizerConfig)}
    assert muon.optimizer == MuonConfig(**shared, beta=0.95, b1=0.9, b2=0.95)
    assert soap.optimizer == SoapConfig(**shared, b1=0.95, b2=0.95, interval=10)
    assert ademamix.optimizer == AdEMAMixConfig(**shared, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0, slow_warmup=None)
    assert nadamw.trainer == muon.trainer == soap.trainer == ademamix.trainer == adamw.trainer


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_the_published_settings_are_in_files_named_so(name, tmp_path):
    """The others are for short runs: what a user takes who reads no further."""
    loaded = {}
    for file in (name, f"{name}_published"):
        path = tmp_path / f"{file}.yaml"
        path.write_text(f"defaults: [{CONFIG_DIR / 'base' / file}.yaml]\n")
        loaded[file] = load_config(path).optimizer
    short, published = loaded.values()
    assert (short.bias_correct_momentum, short.bias_correct_curvature) == (True, True)
    assert (published.bias_correct_momentum, published.bias_correct_curvature) == (False, False)
    assert (short.b1, published.b1) == (0.9, 0.965)
    nano = named("nano", "sophia" if name == "sophia_g" else name).optimizer
    given = {"learning_rate": nano.learning_rate, "final_fraction": nano.final_fraction, "warmup": nano.warmup}
    assert nano == dataclasses.replace(short, **given)


def test_optimizers_of_one_size_differ_in_the_optimizer_only():
    for size in GPT2_SIZES:
        runs = [loaded(file) for file in FILES if file.stem.startswith(f"gpt2_{size}_")]
        assert len({(run.model, run.data, run.trainer) for run in runs}) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_preset_needs_one_flag_for_another_length_or_rate(file):
    """A warm-up in steps, or a final rate that is not a fraction of the peak, would be refused."""
    config = load_config(file, [("trainer.num_train_steps", "60"), ("optimizer.learning_rate", "1e-7")])
    assert config.trainer.evaluation_interval < config.trainer.num_train_steps


def test_warmup_must_end_within_the_run():
    TrainConfig(optimizer=SophiaGConfig(warmup=10), trainer=TrainerConfig(num_train_steps=10))
    with pytest.raises(InputError, match=r"optimizer\.warmup 11 exceeds trainer\.num_train_steps 10"):
        TrainConfig(optimizer=SophiaGConfig(warmup=11), trainer=TrainerConfig(num_train_steps=10))


NOT_A_NUMBER = float("nan")


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        *((Gpt2Config, name, 0) for name in ("num_layers", "num_heads", "embed_dim", "seq_len", "mlp_ratio")),
        (Gpt2Config, "loss_block_size", 0),
        (Gpt2Config, "num_heads", 7),
        (Gpt2Config, "dropout", 1.0),
        (Gpt2Config, "dropout", NOT_A_NUMBER),
        (Gpt2Config, "layer_norm_epsilon", 0.0),
        (Gpt2Config, "initializer_range", -1.0),
        (Gpt2Config, "gradient_checkpointing", "some"),
        *((OptimizerConfig, "learning_rate", value) for value in (0.0, -1.0, NOT_A_NUMBER)),
        (OptimizerConfig, "final_learning_rate", 1.0),
        (OptimizerConfig, "final_learning_rate", -1.0),
        *((OptimizerConfig, "final_fraction", value) for value in (-0.1, 1.1)),
        *((OptimizerConfig, "warmup", value) for value in (1.5, NOT_A_NUMBER)),
        (TrainerConfig, "evaluate_every", 2.5),
        (TrainerConfig, "statistics_every", 2.5),
        (OptimizerConfig, "warmup", -1),
        (OptimizerConfig, "weight_decay", -0.1),
        *((cls, beta, 1.0) for cls in TYPES.values() for beta in ("b1", "b2")),
        *((cls, "rho", 0.0) for cls in (SophiaGConfig, SophiaHConfig)),
        *((cls, "eps", 0.0) for cls in (SophiaGConfig, SophiaHConfig, AdamWConfig)),
        *((cls, "interval", 0) for cls in (SophiaGConfig, SophiaHConfig)),
        *((SophiaGConfig, "curvature_batch_fraction", value) for value in (0.0, 1.1)),
        (SophiaGConfig, "curvature_reduce", "mean"),
        (SophiaGConfig, "curvature_labels", "true"),
        *((MuonConfig, beta, value) for beta in ("beta", "b1", "b2") for value in (1.0, -0.1)),
        (MuonConfig, "eps", 0.0),
        (SoapConfig, "eps", 0.0),
        *((AdEMAMixConfig, name, 1.0) for name in ("b1", "b2", "b3")),
        *((AdEMAMixConfig, name, -1.0) for name in ("alpha", "slow_warmup")),
        *((SoapConfig, name, 0) for name in ("interval", "basis_max_size")),
        *((SophiaGConfig, "curvature_max_grad_norm", value) for value in (0.0, -1.0)),
        (SophiaHConfig, "probe", "uniform"),
        (SophiaHConfig, "num_probes", 0),
        (SophiaHConfig, "curvature_microbatch_size", 0),
        *((SophiaHConfig, name, -1) for name in ("first_refresh", "initial_refreshes")),
        *((SophiaGConfig, "target_win_rate", value) for value in (0.0, 1.0)),
        (SophiaGConfig, "denominator", "sum"),
        (SophiaHConfig, "denominator", "add"),
        (SophiaGConfig, "basis", "eigen"),
        (SophiaHConfig, "basis_b2", 1.0),
        (SophiaGConfig, "curvature_dtype", "float16"),
        (AdamWConfig, "momentum_dtype", "half"),
        (SophiaHConfig, "basis_max_size", 0),
        (SophiaGConfig, "refresh_order", "during"),
        *(
            (TrainerConfig, name, 0)
            for name in (
                "num_train_steps",
                "batch_size",
                "microbatch_size",
                "max_skipped_steps",
                "evaluate_every",
                "evaluation_windows",
                "checkpoint_every",
                "keep_checkpoints",
                "log_every",
                "statistics_every",
                "max_grad_norm",
            )
        ),
        (TrainerConfig, "microbatch_size", 7),
        (TrainerConfig, "seed", -1),
        (TrainerConfig, "seed", 2**32),
        (TrainerConfig, "sample_tokens", -1),
        *((TrainerConfig, name, "float16") for name in ("compute_dtype", "parameter_dtype")),
        *((Gpt2Config, name, 2**20 + 1) for name in ("num_layers", "num_heads", "embed_dim", "seq_len")),
        (Gpt2Config, "attention", "flash"),
        (TrainerConfig, "num_train_steps", 2**31),
        (TrainerConfig, "batch_size", 2**20 + 1),
        (DataConfig, "validation_fraction", 2.0),
        (DataConfig, "num_workers", -1),
        *((DataConfig, name, "drop") for name in ("invalid_utf8", "bad_rows")),
        (MeshConfig, "heads", "data"),
        (MeshConfig, "position", "model"),
    ],
)
def test_value_out_of_range_names_the_field_and_the_value(cls, field, value):
    with pytest.raises(InputError) as error:
        cls(**{field: value})
    message = str(error.value)
    assert "\n" not in message
    assert f".{field} " in message
    assert str(value) in message
