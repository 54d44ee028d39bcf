"""Whole runs of the training step take the path of the Sophia authors' program."""

import json
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.config.optimizer import OptimizerConfig
from sophia_levanter.models.gpt2 import Gpt2Config
from sophia_levanter.models.huggingface import gpt2_from_state_dict, gpt2_to_state_dict
from sophia_levanter.models.language_model import decay_mask
from sophia_levanter.optim import AdamW, GaussNewtonBartlett, SophiaG
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, TrainState, train_step

GOLDEN = Path(__file__).parents[1] / "golden"
AVERAGED = GaussNewtonBartlett(reduction="average_then_square")


def batch_of(inputs: np.ndarray, targets: np.ndarray, num_microbatches: int) -> Batch:
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    return batch_from_sequences(np.concatenate([inputs, targets[:, -1:]], axis=1), num_microbatches=num_microbatches)


def labels_of(labels: np.ndarray, num_microbatches: int):
    return batch_from_sequences(
        np.concatenate([labels[:, :1], labels], axis=1), num_microbatches=num_microbatches
    ).targets


FAST_GOLDENS = [
    ("train_adamw_scaled_attn_nobias", 1, 1),
    ("train_sophiag_scaled_attn_nobias", 2, 4),
]
ALL_GOLDENS = [
    (name, devices, microbatches)
    for name in ("train_adamw", "train_adamw_scaled_attn_nobias", "train_sophiag", "train_sophiag_scaled_attn_nobias")
    for devices, microbatches in ((1, 1), (8, 1), (1, 4), (2, 4))
]


@pytest.mark.parametrize(
    ("name", "devices", "num_microbatches"),
    [g if g in FAST_GOLDENS else pytest.param(*g, marks=pytest.mark.slow) for g in ALL_GOLDENS],
)
def test_golden_run(name: str, devices: int, num_microbatches: int):
    """The key's bias has a gradient of zero in theory, whose rounding the optimizers normalise: with biases float32 is
    the reference's within its first 40 steps, and all 80 are compared in float64, which leaves the reference's rounding
    alone."""
    if "nobias" in name:
        check_golden_run(name, devices, num_microbatches, jnp.float32, steps=80)
        return
    check_golden_run(name, devices, num_microbatches, jnp.float32, steps=40)
    with jax.enable_x64(True):
        check_golden_run(name, devices, num_microbatches, jnp.float64, steps=80)


def check_golden_run(name: str, devices: int, num_microbatches: int, dtype: jnp.dtype, steps: int):
    golden = np.load(GOLDEN / f"{name}.npz")
    h = json.loads(str(golden["hyperparameters"]))
    assert steps <= h["steps"]
    config = Gpt2Config(
        num_layers=h["n_layer"],
        num_heads=h["n_head"],
        embed_dim=h["n_embd"],
        seq_len=h["block_size"],
        use_bias=h["bias"],
        scale_attn_by_inverse_layer_idx="scaled_attn" in name,
        loss_block_size=16,
    )
    initial = {key.removeprefix("init/"): golden[key] for key in golden.files if key.startswith("init/")}
    policy = jmp.get_policy(jnp.dtype(dtype).name)
    model = gpt2_from_state_dict(config, initial, layout="linear")
    shared = {
        "learning_rate": OptimizerConfig(
            learning_rate=h["lr"], final_learning_rate=h["min_lr"], warmup=h["warmup"]
        ).build_schedule(h["steps"]),
        "b1": h["beta1"],
        "b2": h["beta2"],
        "weight_decay": h["weight_decay"],
        "weight_decay_mask": decay_mask,
    }
    sophia = "sophiag" in name
    uncorrected = {"bias_correct_momentum": False, "bias_correct_curvature": False}
    optimizer = (
        SophiaG(**shared, **uncorrected, rho=h["rho"], eps=1e-15, estimator=AVERAGED) if sophia else AdamW(**shared)
    )
    settings = StepSettings(optimizer, max_grad_norm=h["grad_clip"], policy=policy)
    partition = partition_of(devices=jax.devices()[:devices])
    state = partition.place(TrainState.init(model, optimizer, policy))
    plain, refreshing = (eqx.filter_jit(partial(train_step, settings, refresh)) for refresh in (False, True))
    loss, grad_norm = [], []

    def curvature_at(t: int) -> dict:
        # The authors refresh after step 9, 19, ... on a fresh batch; that is before step 10, 20, ... here.
        inputs, labels = (golden[f"hessian_{x}"][t // h["k"] - 1] for x in ("inputs", "sampled_targets"))
        batch = batch_from_sequences(np.pad(inputs, [(0, 0), (0, 1)]), num_microbatches=num_microbatches)
        return {
            "curvature_batch": partition.place(batch),
            "samples": partition.place(labels_of(labels, num_microbatches)),
        }

    with partition.active():
        for t in range(steps):
            batch = partition.place(batch_of(golden["inputs"][t], golden["targets"][t], num_microbatches))
            if sophia and t and t % h["k"] == 0:
                state, output = refreshing(batch, state, **curvature_at(t))
            else:
                state, output = plain(batch, state)
            loss.append(float(output.metrics["train/loss"]))
            grad_norm.append(float(output.metrics["train/grad_norm"]))
        if sophia:
            refreshed, _ = refreshing(batch, state, **curvature_at(steps))
    error = np.abs(np.array(loss) / golden["loss"][:steps] - 1)
    assert error[:10].max() < 1e-6
    assert error[:40].max() < 2e-4
    assert error.max() < 5e-3
    assert np.abs(np.array(grad_norm) / golden["grad_norm"][:steps] - 1)[:10].max() < 1e-5
    if not h["bias"]:
        final = gpt2_to_state_dict(state.model, layout="linear")
        for key, array in final.items():
            np.testing.assert_allclose(array, golden[f"final/{key}"], atol=1e-2)
    if sophia and not h["bias"]:
        curvature = gpt2_to_state_dict(refreshed.optimizer_state.curvature, layout="linear")
        for key, array in curvature.items():
            # Theirs leaves out B. The two runs' parameters differ by up to 1e-2 at the last refreshes.
            theirs = golden[f"final_hessian/{key}"]
            assert np.linalg.norm(array / h["bs"] - theirs) < 1e-2 * np.linalg.norm(theirs), key
