"""How far runs in bfloat16 are from runs in float32."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_meshes import nano, train

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.main import main


def in_bfloat16(config, *names):
    """The configuration with these of its dtypes at bfloat16."""
    sections = {"trainer": config.trainer, "optimizer": config.optimizer}
    for name in names:
        section, field = name.split(".")
        sections[section] = dataclasses.replace(sections[section], **{field: "bfloat16"})
    return dataclasses.replace(config, **sections)


# The mean distance of the losses of 200 steps, in nats, and the distance of the mean of the last 20.
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sophia", "sophia_h"])
@pytest.mark.parametrize(
    ("names", "limit"),
    [
        (["trainer.compute_dtype"], 0.02),
        (["trainer.compute_dtype", "optimizer.momentum_dtype"], 0.02),
        (["trainer.compute_dtype", "optimizer.momentum_dtype", "optimizer.curvature_dtype"], 0.03),
    ],
)
def test_bfloat16_stays_near_float32(optimizer, names, limit):
    config = nano(optimizer, 2)
    wide, _ = train(config, 1, 200)
    narrow, state = train(dataclasses.replace(in_bfloat16(config, *names), mesh=MeshConfig(fsdp="embed")), 2, 200)
    assert np.mean(np.abs(narrow - wide)) < limit
    assert abs(np.mean(narrow[-20:]) - np.mean(wide[-20:])) < limit
    assert state.model.wte.weight.dtype == jnp.float32


def test_every_dtype_is_that_of_the_configuration():
    names = ["trainer.parameter_dtype", "trainer.compute_dtype", "optimizer.momentum_dtype"]
    config = in_bfloat16(nano("sophia", 2), *names)
    # Each step refreshes the curvature, so that they are one program.
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, interval=1))
    losses, state = train(config, 1, 3)
    arrays = (
        tree.wte.weight for tree in (state.model, state.optimizer_state.momentum, state.optimizer_state.curvature)
    )
    assert [array.dtype for array in arrays] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert np.isfinite(losses).all()


def test_a_baseline_keeps_the_dtype_of_the_parameters(config_file, tmp_path):
    """A state with other dtypes would not fit the compiled step."""
    words = ["--optimizer.type", "adamw", "--trainer.parameter_dtype", "bfloat16", "--trainer.num_train_steps", "3"]
    run_dir = tmp_path / "run"
    assert main(["--config", str(config_file), *words, "--trainer.run_dir", str(run_dir)]) == 0
    (saved,) = (run_dir / "checkpoints").glob("step-*/manifest.json")
    arrays = json.loads(saved.read_text())["arrays"]
    assert {a["dtype"] for a in arrays if a["path"].startswith("model.")} == {"bfloat16"}
