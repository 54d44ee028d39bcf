"""What the measurements of trained models share: a run's batches, its model after some steps, arrays by their kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.batch import batch_from_windows
from sophia_levanter.config import TrainConfig
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.data.prepare import TextData
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.step import StepSettings, TrainState, train_step

Vectors = dict[str, jax.Array]
Rows = Mapping[str, tuple[int, ...]]
BLOCK_MATRICES = "block matrices"
_MATRICES = {
    ".attn.c_attn": "attention qkv",
    ".attn.c_proj": "attention out",
    ".mlp.c_fc": "mlp in",
    ".mlp.c_proj": "mlp out",
}


def train_batches(config: TrainConfig, data: TextData) -> TrainBatches:
    """The batches that a run is trained on, and those after its end."""
    trainer = config.trainer
    return TrainBatches(data.train, seq_len=config.model.seq_len, batch_size=trainer.batch_size, seed=trainer.seed)


def trained(
    config: TrainConfig, batches: TrainBatches, vocab_size: int, num_steps: Sequence[int]
) -> Iterator[tuple[int, TrainState]]:
    """One run's state after each of some numbers of steps.

    Args:
        config: the run.
        batches: what it is trained on.
        vocab_size: tokens that can be predicted.
        num_steps: in any order; each number comes once, the smallest first.

    Yields:
        The number of steps and the state on one device, whose buffers the next step takes over.
    """
    partition = partition_of(devices=jax.devices()[:1])
    settings = StepSettings.of(config)

    def initial_state() -> TrainState:
        model = config.model.build(vocab_size=vocab_size, key=jax.random.key(config.trainer.seed))
        return TrainState.init(model, settings.optimizer, settings.policy)

    state = partition.init_sharded(initial_state)
    steps: dict[bool, Any] = {
        refresh: eqx.filter_jit(partial(train_step, settings, refresh), donate="all-except-first")
        for refresh in (False, True)
    }
    done = 0
    for wanted in sorted(set(num_steps)):
        with partition.active():
            for step in range(done, wanted):
                batch = partition.place(
                    batch_from_windows(batches[step], num_microbatches=config.trainer.num_microbatches)
                )
                state, _ = steps[bool(settings.optimizer.refresh_due(step))](batch, state)
        done = wanted
        yield wanted, state


def by_kind(tree: LanguageModel, rows: Rows, *, each_matrix: bool = False) -> Vectors:
    """The coordinates of a tree like the model, by kind of array.

    Args:
        tree: a model, or an estimate like it.
        rows: of the token embedding, by kind; others are left out.
        each_matrix: whether the blocks' matrices are four kinds, by what they do, or one.
    """
    embedding = tree.head_weights().rearrange(("vocab", "embed")).array
    matrices = list(_MATRICES.values()) if each_matrix else [BLOCK_MATRICES]
    parts: dict[str, list[jax.Array]] = {kind: [] for kind in matrices}
    parts |= {kind: [embedding[np.array(which, int)]] for kind, which in rows.items()}
    parts |= {"position embedding": [], "norms": [], "biases": []}
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        if ".wte" not in name:
            parts[_kind(name, each_matrix)].append(leaf)
    joined = {kind: jnp.concatenate([x.ravel() for x in found]) for kind, found in parts.items() if found}
    return {kind: vector for kind, vector in joined.items() if vector.size}


def _kind(name: str, each_matrix: bool) -> str:
    if ".wpe" in name:
        return "position embedding"
    if ".ln_" in name:
        return "norms"
    if ".bias" in name:
        return "biases"
    return next(kind for part, kind in _MATRICES.items() if part in name) if each_matrix else BLOCK_MATRICES
