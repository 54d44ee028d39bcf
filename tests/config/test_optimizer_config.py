"""From settings to optimizers and learning-rate schedules: every field arrives."""

import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, AdEMAMixConfig, LionConfig, MuonConfig, SoapConfig
from sophia_levanter.config.optimizer import OptimizerConfig, SophiaGConfig, SophiaHConfig
from sophia_levanter.config.schedule import ScheduleConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.errors import InputError
from sophia_levanter.models.language_model import decay_mask, matrix_axes
from sophia_levanter.optim import (
    AbstractSophia,
    AdamW,
    AdEMAMix,
    EmpiricalFisher,
    GaussNewtonBartlett,
    Hutchinson,
    KroneckerBasis,
    Lion,
    Muon,
    ReproducedSophia,
    Soap,
    Sophia,
    WinRateController,
)
from sophia_levanter.training.step import StepSettings

RATES = {
    "learning_rate": 0.1,
    "final_learning_rate": 0.01,
    "warmup": 10,
    "weight_decay": 0.3,
    "momentum_dtype": "bfloat16",
}
SOPHIA = {
    "b1": 0.8,
    "b2": 0.7,
    "rho": 0.6,
    "eps": 1e-5,
    "interval": 4,
    "bias_correct_momentum": True,
    "bias_correct_curvature": True,
    "denominator": "add",
    "refresh_order": "after",
    "first_refresh": 3,
    "initial_refreshes": 5,
}
GNB = {"curvature_reduce": "average_then_square", "curvature_max_grad_norm": 2.0}
CASES = [
    (
        SophiaGConfig(**RATES, **SOPHIA, **GNB),
        ReproducedSophia,
        SOPHIA | {"estimator": GaussNewtonBartlett(reduction="average_then_square", max_grad_norm=2.0)},
    ),
    (
        SophiaGConfig(**RATES, curvature_labels="data", **GNB),
        Sophia,
        {"estimator": EmpiricalFisher(reduction="average_then_square", max_grad_norm=2.0)},
    ),
    (
        SophiaHConfig(
            **RATES, **SOPHIA | {"denominator": "max"}, probe="gaussian", num_probes=3, curvature_dtype="bfloat16"
        ),
        ReproducedSophia,
        SOPHIA | {"denominator": "max", "estimator": Hutchinson("gaussian", 3), "curvature_dtype": jnp.bfloat16},
    ),
    (
        SophiaGConfig(**RATES, **SOPHIA | {"target_win_rate": 0.4}),
        ReproducedSophia,
        SOPHIA | {"rho": WinRateController(target=0.4, initial=0.6)},
    ),
    (SophiaGConfig(**RATES, rho="auto"), Sophia, {"rho": WinRateController(target=0.3, initial=0.05)}),
    (
        SophiaHConfig(**RATES, rho="auto", target_win_rate=0.4),
        Sophia,
        {"rho": WinRateController(target=0.4, initial=0.01)},
    ),
    (
        SophiaHConfig(**RATES, basis="kronecker", basis_b2=0.6, basis_max_size=100),
        Sophia,
        {"basis": KroneckerBasis(matrices=matrix_axes, b2=0.6, max_size=100, mesh_axis="data")},
    ),
    (SophiaGConfig(**RATES), Sophia, {"basis": None, "curvature_dtype": jnp.float32}),
    (
        AdamWConfig(**RATES, b1=0.8, b2=0.7, eps=1e-5, nesterov=True),
        AdamW,
        {"b1": 0.8, "b2": 0.7, "eps": 1e-5, "nesterov": True},
    ),
    (AdamWConfig(**RATES), AdamW, {"nesterov": False}),
    (LionConfig(**RATES, b1=0.8, b2=0.7), Lion, {"b1": 0.8, "b2": 0.7}),
    (
        MuonConfig(**RATES, beta=0.9, b1=0.8, b2=0.7, eps=1e-5),
        Muon,
        {"beta": 0.9, "b1": 0.8, "b2": 0.7, "eps": 1e-5, "matrices": matrix_axes},
    ),
    (
        SoapConfig(**RATES, b1=0.8, b2=0.7, eps=1e-5, interval=3, basis_max_size=100),
        Soap,
        {"b1": 0.8, "b2": 0.7, "eps": 1e-5, "interval": 3, "basis": KroneckerBasis(matrix_axes, 0.7, 100, "data")},
    ),
    (AdEMAMixConfig(**RATES, slow_warmup=0.5), AdEMAMix, {"slow_warmup": 55}),
    (
        AdEMAMixConfig(**RATES, b1=0.8, b2=0.7, b3=0.9, alpha=2.0, eps=1e-5),
        AdEMAMix,
        {"b1": 0.8, "b2": 0.7, "b3": 0.9, "alpha": 2.0, "slow_warmup": 110, "eps": 1e-5},
    ),
]


def settings_of(optimizer):
    """The hyper-parameters by the names of the arguments; Sophia groups them."""
    found = dict(vars(optimizer))
    if not isinstance(optimizer, AbstractSophia):
        return found
    for average, which in ((optimizer.momentum, "momentum"), (optimizer.curvature, "curvature")):
        own = dict(vars(average))
        found |= {f"bias_correct_{which}": own.pop("bias_correct"), f"{which}_dtype": own.pop("dtype")} | own
    found |= {"weight_decay": optimizer.weight_decay.rate, "weight_decay_mask": optimizer.weight_decay.mask}
    found["rho"] = getattr(optimizer.rho, "value", optimizer.rho)
    choices = getattr(optimizer, "choices", ("max", "before", 0))
    return found | dict(zip(("denominator", "refresh_order", "first_refresh"), choices, strict=True))


@pytest.mark.parametrize(("config", "kind", "fields"), CASES)
def test_every_setting_arrives(config, kind, fields):
    optimizer = config.build(110)
    assert type(optimizer) is kind
    found = settings_of(optimizer)
    assert {name: found[name] for name in fields} == fields
    assert found["momentum_dtype"] == jnp.bfloat16
    assert found["weight_decay"] == 0.3
    assert found["weight_decay_mask"] is decay_mask
    rates = [float(optimizer.learning_rate(step)) for step in (0, 5, 10, 110)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.01])


@pytest.mark.parametrize(
    ("fraction", "batch_size", "microbatch_size", "wanted"),
    [(0.5, 480, 16, 15), (32 / 480, 480, 16, 2), (32 / 480, 8, None, 1), (0.01, 12, 4, 1)],
)
def test_the_curvature_takes_whole_microbatches(fraction, batch_size, microbatch_size, wanted):
    trainer = TrainerConfig(batch_size=batch_size, microbatch_size=microbatch_size)
    config = SophiaGConfig(curvature_batch_fraction=fraction)
    assert config.curvature_microbatches(trainer) == (wanted, microbatch_size or batch_size)


def test_the_hessian_may_have_smaller_microbatches():
    trainer = TrainerConfig(batch_size=480, microbatch_size=16)
    config = SophiaHConfig(curvature_batch_fraction=1 / 15, curvature_microbatch_size=4)
    assert config.curvature_microbatches(trainer) == (8, 4)
    assert config.describe_curvature(trainer) == "every 10 steps, on 7% of the batch, rho 0.01"
    settings = StepSettings.of(TrainConfig(optimizer=config, trainer=trainer))
    assert (settings.curvature_microbatches, settings.curvature_microbatch_size) == (8, 4)


def test_the_share_in_effect_is_that_of_whole_microbatches():
    trainer = TrainerConfig(batch_size=12, microbatch_size=4)
    config = SophiaGConfig(curvature_batch_fraction=0.5, initial_refreshes=3, basis="kronecker")
    assert config.describe_curvature(trainer) == (
        "every 10 steps and in each of the first 3, on 67% of the batch, in a Kronecker basis, rho 0.05"
    )


def test_labels_of_the_data_need_no_extra_pass():
    """Whether they leave a part of the batch for the gradient or not."""
    for fraction in (0.5, 1.0):
        with pytest.raises(InputError, match=r"^optimizer\.curvature_extra_pass is false, but curvature_labels data "):
            SophiaGConfig(curvature_labels="data", curvature_extra_pass=False, curvature_batch_fraction=fraction)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"rho": "auto"}, "rho auto"),
        ({"rho": "auto", "target_win_rate": 0.2}, "rho auto for a win rate of 0.2"),
        ({"rho": 0.5, "target_win_rate": 0.2}, "rho 0.5 for a win rate of 0.2"),
    ],
)
def test_the_line_about_the_curvature_says_how_rho_is_set(given, wanted):
    line = SophiaGConfig(**given).describe_curvature(TrainerConfig(batch_size=12, microbatch_size=4))
    assert line == f"every 10 steps, on 67% of the batch, {wanted}"


def test_step_settings():
    trainer = TrainerConfig(batch_size=8, microbatch_size=2, seed=7, compute_dtype="bfloat16", max_grad_norm=0.5)
    settings = StepSettings.of(TrainConfig(optimizer=SophiaGConfig(), trainer=trainer))
    assert (settings.seed, settings.max_grad_norm, settings.curvature_microbatches) == (7, 0.5, 2)
    assert settings.curvature_microbatch_size is None
    assert (settings.policy.param_dtype, settings.policy.compute_dtype) == (jnp.float32, jnp.bfloat16)
    assert StepSettings.of(TrainConfig(optimizer=AdamWConfig(), trainer=trainer)).curvature_microbatches is None


def at(schedule, steps):
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]


def schedule_of(kind, own=None, **changes):
    given = {"learning_rate": 2.0, "final_learning_rate": 0.4, "warmup": 4} | changes
    schedule = ScheduleConfig.get_known_choices()[kind](**(own or {}))
    return OptimizerConfig(**given, schedule=schedule).build_schedule(12)


def test_warmup_starts_at_zero_and_reaches_the_peak():
    assert at(schedule_of("cosine"), range(5)) == pytest.approx([0, 0.5, 1, 1.5, 2], abs=1e-7)


def test_the_cosine_schedule():
    # Two, four and six eighths of the way: final + (peak - final) (1 + cos(pi share)) / 2.
    wanted = [1.2 + 0.8 * np.sqrt(0.5), 1.2, 1.2 - 0.8 * np.sqrt(0.5), 0.4]
    assert at(schedule_of("cosine"), [6, 8, 10, 12]) == pytest.approx(wanted, abs=1e-6)


def test_the_linear_schedule():
    assert at(schedule_of("linear"), [6, 8, 10, 12]) == pytest.approx([1.6, 1.2, 0.8, 0.4], abs=1e-6)


@pytest.mark.parametrize(("kind", "end"), [("cosine", 0.4), ("linear", 0.4), ("constant", 2.0), ("wsd", 0.4)])
def test_the_rate_stays_at_the_end_value(kind, end):
    assert at(schedule_of(kind), [12, 13, 1000]) == pytest.approx([end] * 3, abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_no_warmup_starts_at_the_peak(kind):
    assert at(schedule_of(kind, warmup=0), [0]) == [2.0]


@pytest.mark.parametrize(("shape", "middle"), [("linear", 1.2), ("cosine", 1.2), ("1-sqrt", 2 - 1.6 * np.sqrt(0.5))])
def test_warmup_stable_decay(shape, middle):
    """Of the eight steps after the warm-up, the last four decay."""
    for decay in (4, 0.5):
        found = at(schedule_of("wsd", {"decay": decay, "shape": shape}), [4, 6, 8, 10, 12])
        assert found == pytest.approx([2, 2, 2, middle, 0.4], abs=1e-6)
    assert at(schedule_of("wsd", {"decay": 100, "shape": shape}), [4, 8]) == pytest.approx([2, middle], abs=1e-6)


def test_the_inverse_square_root():
    found = at(schedule_of("inverse_sqrt", {"timescale": 4}), [4, 8, 16])
    assert found == pytest.approx([2, 2 * np.sqrt(0.5), 1], abs=1e-6)


def test_a_fraction_follows_the_length_and_the_peak():
    config = OptimizerConfig(learning_rate=2.0, final_fraction=0.25, warmup=0.25)
    for steps in (8, 16):
        assert at(config.build_schedule(steps), [0, steps // 8, steps // 4, steps]) == pytest.approx([0, 1, 2, 0.5])


def test_warmup_over_the_whole_run():
    assert at(schedule_of("cosine", warmup=12), [0, 6, 11, 12]) == pytest.approx([0, 1, 11 / 6, 2], abs=1e-6)
