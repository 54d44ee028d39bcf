"""Statistics of single arrays against numpy, and in runs that measure them on some steps."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import NamedArray

from sophia_levanter import checkpoint
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.main import main
from sophia_levanter.optim import SophiaG
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.array_statistics import QUANTILES, array_statistics, by_layer, quantiles
from sophia_levanter.training.metrics import StepTrees
from sophia_levanter.training.step import TrainState

SHARES = tuple(QUANTILES.values())


def drawn(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def arrays(tree):
    """The named arrays of a tree by path, float64 [layer, ...]; one that is not in a stack has one layer."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, NamedArray))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    return {
        name: np.asarray(x.array, np.float64)[() if name.startswith("blocks/") else None] for name, x in named.items()
    }


def rms(x):
    return np.sqrt([np.mean(layer**2) for layer in x])


def test_they_are_those_that_numpy_computes(make_model):
    """After a first step, when the corrected averages are the gradient and the estimate; with arrays in eight parts."""
    model, optimizer = make_model(), SophiaG(learning_rate=0.1, rho=0.7)
    before = TrainState.init(model, optimizer)
    grads, estimate = drawn(model, 1), drawn(model, 2)
    updates, state = jax.jit(optimizer.update)(grads, before.optimizer_state, model, estimate)
    step = StepTrees(grads, updates, before, dataclasses.replace(before, optimizer_state=state))
    partition = partition_of(MeshConfig(fsdp="embed"))
    with partition.active():
        found = jax.jit(lambda step: array_statistics(optimizer, step))(partition.place(step))
    kinds = ["weight_rms", "gradient_rms", "update_rms", "update_ratio", "win_rate", *QUANTILES]
    trees = [arrays(tree) for tree in (model, grads, updates, estimate)]
    assert set(found) == {f"{name}/{kind}" for name in trees[0] for kind in kinds}
    assert found["blocks/stacked/attn/c_attn/weight/weight_rms"].shape == (2,)
    for name in trees[0]:
        weight, gradient, update, h = (tree[name] for tree in trees)
        wanted = [rms(weight), rms(gradient), rms(update), rms(update) / rms(weight)]
        unclipped = (np.abs(gradient) < 0.7 * h) & (h > 0)
        wanted.append([np.mean(layer) for layer in unclipped])
        stored = np.float32(1 - 0.99) * h
        wanted += list(np.transpose([np.quantile(x, SHARES, method="inverted_cdf") for x in stored]))
        for kind, values in zip(kinds, wanted, strict=True):
            np.testing.assert_allclose(np.ravel(found[f"{name}/{kind}"]), values, rtol=1e-5, err_msg=f"{name} {kind}")


@pytest.mark.parametrize("axes", [(1, 2), (0, 1, 2)])
def test_quantiles_are_those_of_sorted_numbers(axes):
    x = np.random.default_rng(0).normal(size=(3, 10, 7)).astype(np.float32)
    x[0, :3], x[1], x[2, 4:] = 0, 1e-30 * x[1], -0.0
    shares = (*SHARES, 0.001, 1.0)
    wanted = np.quantile(x, shares, axis=axes, method="inverted_cdf")
    np.testing.assert_array_equal(jax.jit(lambda x: quantiles(x, axes, shares))(x), wanted)


def test_names_are_in_the_order_of_arrays_and_layers():
    logged = by_layer({"b/weight/weight_rms": jnp.arange(11.0), "a/win_rate": jnp.float32(0.5), "a/b": jnp.zeros(1)})
    assert list(logged.values()) == [0.0, 0.5, *range(11)]
    assert [*logged][:3] == ["statistics/a/0/b", "statistics/a/win_rate", "statistics/b/weight/0/weight_rms"]
    assert [*logged][-1] == "statistics/b/weight/10/weight_rms"


def test_the_steps_that_measure():
    def steps(every):
        trainer = TrainerConfig(num_train_steps=10, statistics_every=every)
        return [step for step in range(10) if trainer.statistics_due(step)]

    assert (steps(None), steps(4), steps(0.5), steps(0.001)) == ([], [0, 4, 8], [0, 5], list(range(10)))


def lines_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


def test_a_run_and_its_resume(config_file, finished_run, tmp_path, capfd):
    run_dir = tmp_path / "run"
    command = ["--config", str(config_file), "--trainer.run_dir", str(run_dir), "--optimizer.type", "adamw"]
    assert main([*command, "--trainer.statistics_every", "6"]) == 0
    assert capfd.readouterr().out.count("compiling 1 training step with array statistics") == 1
    lines = lines_of(run_dir)
    found = {
        step: {name.removeprefix("statistics/"): x for name, x in line.items() if name.startswith("statistics/")}
        for step, line in lines.items()
    }
    assert [step for step in range(12) if found[step]] == [0, 6]
    manifest = checkpoint.read_step(run_dir / "checkpoints", 6)
    sizes = {}
    for path, weights in checkpoint.read_arrays(run_dir / "checkpoints", manifest):
        if not path.startswith("model."):
            continue
        name = path.removeprefix("model.").replace(".", "/")
        stack = [(f"{name}/{i}", layer) for i, layer in enumerate(weights)] if "stacked" in name else [(name, weights)]
        for place, part in stack:
            sizes[place] = part.size
            assert found[6][f"{place}/weight_rms"] == pytest.approx(np.sqrt(np.mean(part**2)), rel=1e-5)
    assert len(sizes) == 2 * 6 + 3 and len(found[0]) == 4 * len(sizes)
    for step in (0, 6):
        square = sum(size * found[step][f"{place}/gradient_rms"] ** 2 for place, size in sizes.items())
        assert np.sqrt(square) == pytest.approx(lines[step]["train/grad_norm"], rel=1e-5)
    assert not [name for name in manifest.metadata["metrics"] if name.startswith("statistics/")]

    shutil.rmtree(run_dir / "checkpoints/step-00000012")
    assert main(["--resume", str(run_dir)]) == 0
    for step, line in lines_of(run_dir).items():
        assert all(line[name] == x for name, x in lines[step].items() if name.startswith(("statistics/", "train/loss")))

    # Without the setting nothing more is compiled.
    assert finished_run.output.count("training step") == 1
    assert not [name for line in lines_of(finished_run.path).values() for name in line if "statistics" in name]
