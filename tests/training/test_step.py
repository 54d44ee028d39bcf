"""One training step: what microbatches, meshes, curvature settings and bad numbers do to it."""

import dataclasses
from functools import cache, partial

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from sophia_levanter.batch import Batch, batch_from_sequences
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config
from sophia_levanter.models.language_model import decay_mask, hyperball_matrices, matrix_axes
from sophia_levanter.optim import (
    AdamW,
    CautiousWeightDecay,
    GaussNewtonBartlett,
    Hyperball,
    KroneckerBasis,
    SophiaG,
    SophiaH,
)
from sophia_levanter.partition.mesh import Partition, partition_of
from sophia_levanter.training.step import StepOutput, StepSettings, TrainState, curvature_rows, train_step

TINY = Gpt2Config(
    num_layers=1, num_heads=2, embed_dim=16, seq_len=12, loss_block_size=12, gradient_checkpointing="none"
)
STACKED = dataclasses.replace(TINY, num_layers=2, loss_block_size=5)
VOCAB_SIZE, ROWS = 50, 12
NORMS = Hyperball(CautiousWeightDecay(AdamW(weight_decay=0.0), 0.1), hyperball_matrices)
KRONECKER = KroneckerBasis(matrices=matrix_axes)
AVERAGED = GaussNewtonBartlett(reduction="average_then_square")


def windows(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (rows, TINY.seq_len + 1), dtype=np.int32)


@cache
def tiny_model(config: Gpt2Config = TINY) -> Gpt2:
    # Larger initial weights than GPT-2's, so that gradients and curvature are far from 0.
    config = dataclasses.replace(config, initializer_range=0.2)
    return eqx.filter_jit(Gpt2.init)(config, vocab_size=VOCAB_SIZE, key=jax.random.key(1))


def gap(a, b) -> float:
    """The largest difference of two trees of arrays, relative to the largest entry."""
    pairs = list(
        zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array)), strict=True)
    )
    scale = max(float(np.max(np.abs(x))) for x, _ in pairs)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs) / scale


@cache
def jitted(settings: StepSettings, refresh: bool, partition: Partition):
    """The step, compiled once for all tests with these settings on the same devices."""
    return eqx.filter_jit(partial(train_step, settings, refresh))


def take_step(settings: StepSettings, batch: Batch, state=None, *, refresh=True, devices=1, **given):
    """A step on a batch, by default from the tiny model; gives the state after it and the step's output."""
    partition = partition_of(devices=jax.devices()[:devices])
    state = partition.place(state or TrainState.init(tiny_model(), settings.optimizer))
    with partition.active():
        return jitted(settings, refresh, partition)(partition.place(batch), state, **partition.place(given))


@cache
def first_step(
    optimizer, *, rows=range(ROWS), num_microbatches=1, refresh=True, devices=1, **settings
) -> tuple[TrainState, StepOutput]:
    """The step from the tiny model on these rows, run once for all tests."""
    batch = batch_from_sequences(windows()[rows.start : rows.stop], num_microbatches=num_microbatches)
    return take_step(StepSettings(optimizer, **settings), batch, refresh=refresh, devices=devices)


def loss_of(output: StepOutput) -> float:
    return float(output.metrics["train/loss"])


@pytest.mark.parametrize("optimizer", [SophiaG, pytest.param(SophiaH, marks=pytest.mark.slow)], ids=["g", "h"])
def test_a_kronecker_basis_on_a_mesh_in_microbatches(optimizer):
    """bfloat16 compute, the blocked loss and two microbatches, over refreshes in which the basis turns."""
    optimizer = optimizer(learning_rate=3e-3, basis=KRONECKER, weight_decay_mask=decay_mask)
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    settings = StepSettings(optimizer, policy=policy)
    partition = partition_of(devices=jax.devices()[:4])
    batch = partition.place(batch_from_sequences(windows(8), num_microbatches=2))
    state, losses = partition.place(TrainState.init(tiny_model(STACKED), optimizer)), []
    step = jitted(settings, True, partition)
    with partition.active():
        for _ in range(8):
            state, output = step(batch, state)
            losses.append(loss_of(output))
    assert losses[7] < losses[0] - 0.05
    # Every layer of c_attn has a matrix each for query, key and value, over all heads: 16 x 16.
    shapes = {side.vectors.shape for turn in state.optimizer_state.basis if turn is not None for side in turn}
    assert shapes == {(6, 16, 16), (2, 16, 16), (2, 64, 64)}
    for turn in state.optimizer_state.basis:
        for side in turn or ():
            vectors = np.asarray(side.vectors)
            n = vectors.shape[-1]
            np.testing.assert_allclose(vectors.swapaxes(1, 2) @ vectors, [np.eye(n)] * len(vectors), atol=1e-5)
            assert np.max(np.abs(vectors - np.eye(n))) > 0.1


@pytest.mark.parametrize(
    ("size", "count", "first", "others"),
    [
        (None, None, (2, 4), []),
        (None, 1, (1, 4), [(1, 4)]),
        (2, None, (4, 2), []),
        (2, 2, (2, 2), [(1, 4)]),
        (1, 3, (3, 1), [(1, 1), (1, 4)]),
        (2, 3, (3, 2), [(1, 2)]),
    ],
)
def test_the_curvature_takes_the_first_rows(size, count, first, others):
    """The parts hold the rows in their order; each has these numbers of microbatches and rows."""
    weights = np.random.default_rng(1).random((8, TINY.seq_len), np.float32)
    batch = batch_from_sequences(windows(8), weights, num_microbatches=2)
    settings = StepSettings(SophiaG(), curvature_microbatches=count, curvature_microbatch_size=size)
    found, rest = curvature_rows(settings, batch)
    parts = [found, *rest]
    assert [part.tokens.array.shape[:2] for part in parts] == [first, *others]
    for name in ("tokens", "targets", "weights"):
        rows = [np.asarray(getattr(part, name).array).reshape(-1, TINY.seq_len) for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), getattr(batch, name).array.reshape(8, -1))


FIRST_ROWS = range(4)


def first_rows_alone() -> Batch:
    """All rows, of which only the first have targets."""
    weights = np.ones((ROWS, TINY.seq_len), np.float32)
    weights[FIRST_ROWS.stop :] = 0
    return batch_from_sequences(windows(), weights)


@pytest.mark.parametrize(
    ("optimizer", "averaged"), [(SophiaG(), SophiaG(estimator=AVERAGED)), (SophiaH(), SophiaH())], ids=["g", "h"]
)
def test_neither_a_mesh_nor_microbatches_change_the_step(optimizer, averaged):
    """Two devices, two microbatches, and two smaller ones for the curvature: the same rows, probe and labels."""
    cut, output = first_step(
        averaged, devices=2, num_microbatches=2, curvature_microbatch_size=2, curvature_microbatches=2
    )
    whole, whole_output = first_step(optimizer)
    assert loss_of(output) == pytest.approx(loss_of(whole_output), rel=1e-6)
    norms = [float(o.metrics["train/grad_norm"]) for o in (output, whole_output)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert gap(whole.optimizer_state.momentum, cut.optimizer_state.momentum) < 1e-5
    # Labels go by row and one probe serves all; with others the estimates would have nothing in common.
    wanted, _ = take_step(StepSettings(optimizer), first_rows_alone())
    assert gap(wanted.optimizer_state.curvature, cut.optimizer_state.curvature) < 1e-4
    assert gap(wanted.optimizer_state.curvature, whole.optimizer_state.curvature) > 1e-2


END = 7  # the token that ends a document, where some are masked


def documents_apart(sequences: np.ndarray, labels: np.ndarray) -> tuple[Batch, np.ndarray]:
    """Rows with one document each, filled up with positions that do not count, and the labels of each."""
    rows = []
    for sequence, own in zip(sequences, labels, strict=True):
        ends = np.flatnonzero(sequence[:-1] == END) + 1
        for start, end in zip([0, *ends], [*ends, TINY.seq_len], strict=True):
            padding = (0, TINY.seq_len - (end - start))
            parts = (sequence[start:end], sequence[start + 1 : end + 1], np.ones(end - start), own[start:end])
            rows.append([np.pad(part, padding) for part in parts])
    tokens, targets, weights, own = (np.stack(arrays).astype(np.int32) for arrays in zip(*rows, strict=True))
    batch = batch_from_sequences(np.pad(tokens, [(0, 0), (0, 1)]), weights.astype(np.float32))
    return eqx.tree_at(lambda b: b.targets.array, batch, targets[None]), own


@pytest.mark.parametrize(
    ("optimizer", "mesh"),
    [
        (SophiaG(estimator=AVERAGED), MeshConfig(data=2, model=2, fsdp="embed")),
        pytest.param(SophiaH(), MeshConfig(data=2, sequence=2), marks=pytest.mark.slow),
    ],
    ids=["g", "h"],
)
def test_masked_documents_give_the_step_of_documents_in_rows_of_their_own(optimizer, mesh):
    """On meshes, in microbatches and smaller ones for the curvature, with blocks that are computed again."""
    sequences, labels = windows(8, seed=1), windows(8, seed=2)[:, :-1]
    sequences[:, 4] = sequences[::2, 9] = END
    batch, own = documents_apart(sequences, labels)
    assert len(own) >= 20
    axes = batch.tokens.axes
    given = {"samples": hax.named(own[None], axes)} if isinstance(optimizer, SophiaG) else {}
    wanted, wanted_output = take_step(StepSettings(optimizer), batch, **given)

    settings = StepSettings(optimizer, curvature_microbatch_size=2)
    partition = partition_of(mesh, jax.devices()[:4])
    batch = batch_from_sequences(sequences, num_microbatches=2, document_end=END)
    if given:
        given = {"samples": hax.named(labels.reshape(4, 2, -1), ("microbatch", "batch", "position"))}
    model = tiny_model(dataclasses.replace(TINY, gradient_checkpointing="full"))
    state = partition.place(TrainState.init(model, optimizer))
    with partition.active():
        found, output = jitted(settings, True, partition)(partition.place(batch), state, **partition.place(given))
    assert loss_of(output) == pytest.approx(loss_of(wanted_output), rel=1e-6)
    assert gap(wanted.optimizer_state.momentum, found.optimizer_state.momentum) < 1e-5
    assert gap(wanted.optimizer_state.curvature, found.optimizer_state.curvature) < 1e-4


def step_with_curvature_batch(weights=None):
    """A step of Sophia-G on all rows, which estimates the curvature on a separate batch of the first rows."""
    batch = batch_from_sequences(windows()[: FIRST_ROWS.stop], weights)
    return take_step(StepSettings(SophiaG()), batch_from_sequences(windows()), curvature_batch=batch)


def test_the_shared_forward_gives_the_estimate_of_a_pass_of_its_own():
    apart, _ = step_with_curvature_batch()
    shared, _ = first_step(SophiaG(), rows=FIRST_ROWS)
    whole, _ = first_step(SophiaG())
    assert gap(shared.optimizer_state.curvature, apart.optimizer_state.curvature) < 1e-5
    assert gap(whole.optimizer_state.momentum, apart.optimizer_state.momentum) < 1e-5


def test_the_learning_rate_is_that_of_the_step_and_the_norm_is_that_after_it():
    state, output = first_step(SophiaG(learning_rate=lambda count: 0.1 / (count + 1), rho=1e-6))
    assert float(output.metrics["train/learning_rate"]) == pytest.approx(0.1)
    before, after = (
        float(jnp.linalg.norm(jax.flatten_util.ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0]))
        for model in (tiny_model(), state.model)
    )
    assert float(output.metrics["train/parameter_norm"]) == pytest.approx(after, rel=1e-6)
    assert after != pytest.approx(before, rel=1e-3)


def test_a_refresh_leaves_the_gradient_as_it_is_and_the_limit_what_is_below_it():
    refreshing, output = first_step(SophiaG())
    norm = float(output.metrics["train/grad_norm"])
    assert norm < StepSettings(SophiaG()).max_grad_norm
    plain, plain_output = first_step(SophiaG(), refresh=False, max_grad_norm=None)
    m = plain.optimizer_state.momentum
    assert gap(m, refreshing.optimizer_state.momentum) < 1e-5
    assert loss_of(plain_output) == pytest.approx(loss_of(output), rel=1e-6)
    clipped, _ = first_step(SophiaG(), refresh=False, max_grad_norm=norm / 3)
    assert gap(jax.tree.map(lambda x: x / 3, m), clipped.optimizer_state.momentum) < 1e-5


def test_dropout_differs_between_microbatches_and_between_steps():
    model, rows = tiny_model(dataclasses.replace(TINY, dropout=0.5)), np.concatenate([windows(ROWS // 2)] * 2)

    def loss(step, microbatch):
        """Of one of two equal microbatches; the other has no weight."""
        state = eqx.tree_at(lambda s: s.step, TrainState.init(model, AdamW()), jnp.int32(step))
        weights = np.zeros((ROWS, TINY.seq_len), np.float32)
        weights[ROWS // 2 * microbatch : ROWS // 2 * (microbatch + 1)] = 1
        batch = batch_from_sequences(rows, weights, num_microbatches=2)
        return loss_of(take_step(StepSettings(AdamW()), batch, state, refresh=False)[1])

    first = loss(0, 0)
    assert loss(0, 1) != pytest.approx(first, rel=1e-4)
    assert loss(1, 0) != pytest.approx(first, rel=1e-4)


def test_a_spike_of_the_loss_is_skipped():
    """It is compared with the mean loss of the good steps before. The first step has none, and is good."""
    settings = StepSettings(AdamW(), loss_spike_factor=2.0)

    def step(recent):
        start = TrainState.init(tiny_model(), settings.optimizer)
        state = eqx.tree_at(lambda s: s.recent_loss, start, jnp.float32(recent))
        return take_step(settings, batch_from_sequences(windows()), state, refresh=False)

    first, output = step(np.inf)
    loss = loss_of(output)
    good, _ = step(1.01 * loss / 2)
    spike, _ = step(0.99 * loss / 2)
    assert [int(state.skipped_steps) for state in (first, good, spike)] == [0, 0, 1]
    assert gap(good.model, tiny_model()) > 0 == gap(spike.model, tiny_model())
    means = [float(state.recent_loss) / loss for state in (first, good, spike)]
    assert means == pytest.approx([1.0, 0.98 * 1.01 / 2 + 0.02, 0.99 / 2])


def test_weights_leave_positions_out_of_loss_and_curvature():
    state, output = take_step(StepSettings(SophiaG()), first_rows_alone())
    fewer, output_fewer = first_step(SophiaG(), rows=FIRST_ROWS)
    assert loss_of(output) == pytest.approx(loss_of(output_fewer), rel=1e-6)
    assert gap(state.optimizer_state.curvature, fewer.optimizer_state.curvature) < 1e-4


@pytest.mark.parametrize(
    ("optimizer", "devices"),
    [(AdamW(), 1), (NORMS, 4), (SophiaG(), 1), (SophiaH(), 1)],
    ids=["adamw", "norms", "g", "h"],
)
def test_a_non_finite_gradient_changes_nothing_but_counts(optimizer, devices):
    settings, refresh = StepSettings(optimizer), optimizer.refresh_due(0)
    run = partial(take_step, settings, refresh=refresh, devices=devices)
    before, _ = first_step(optimizer, refresh=refresh, devices=devices)
    weights = np.ones((ROWS, TINY.seq_len), np.float32)
    weights[3, 3] = np.nan
    after, output = run(batch_from_sequences(windows(), weights), before)
    assert np.isnan(loss_of(output))
    floats = partial(eqx.filter, filter_spec=eqx.is_inexact_array)
    assert gap(floats(before.model), floats(after.model)) == 0
    assert gap(floats(before.optimizer_state), floats(after.optimizer_state)) == 0
    assert (int(after.step), int(after.skipped_steps), int(output.skipped_in_a_row)) == (2, 1, 1)
    if refresh:
        assert int(after.optimizer_state.count) == 2
        assert int(after.optimizer_state.refresh_count) == 1
        assert bool(output.refresh_pending)
        assert int(after.optimizer_state.skipped_refreshes) == 1
    good, output = run(batch_from_sequences(windows()), after)
    assert gap(floats(good.model), floats(after.model)) > 0
    assert (int(good.skipped_steps), int(output.skipped_in_a_row)) == (1, 0)
    assert not bool(output.refresh_pending)


def test_a_non_finite_estimate_skips_the_refresh_only():
    after, output = step_with_curvature_batch(np.full((4, TINY.seq_len), np.inf, np.float32))
    assert bool(output.refresh_pending)
    assert int(after.optimizer_state.skipped_refreshes) == 1
    assert int(after.skipped_steps) == 0
    assert float(output.metrics["optim/curvature_norm"]) == 0
    assert gap(after.model, tiny_model()) > 0


def test_bfloat16_compute_keeps_float32_state_and_stays_near():
    wide, out_wide = first_step(SophiaG())
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    narrow, out_narrow = first_step(SophiaG(), policy=policy)
    assert {x.dtype for x in jax.tree.leaves(eqx.filter(narrow, eqx.is_inexact_array))} == {jnp.dtype("float32")}
    loss = [loss_of(o) for o in (out_wide, out_narrow)]
    assert loss[0] != loss[1]
    assert loss[1] == pytest.approx(loss[0], rel=1e-2)
    assert gap(wide.optimizer_state.momentum, narrow.optimizer_state.momentum) < 0.05
