"""What a run is made of, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import Partial

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.data import DataConfig
from sophia_levanter.config.model import ModelConfig
from sophia_levanter.config.run import check_mesh
from sophia_levanter.data.batches import TrainBatches, ValidationBatches
from sophia_levanter.data.preparation import cache_directory
from sophia_levanter.data.prepare import TextData, prepare
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.data.verification import Verification
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.mesh import Partition, partition_of
from sophia_levanter.partition.messages import Processes
from sophia_levanter.tracking.console import Console
from sophia_levanter.training.callbacks import Callback, build_callbacks
from sophia_levanter.training.code_version import code_version
from sophia_levanter.training.metrics import check_results
from sophia_levanter.training.step import StepSettings, TrainState
from sophia_levanter.training.summary import attention_of


@dataclass(frozen=True)
class Parts:
    """What a run is made of before it has a state."""

    config: TrainConfig
    partition: Partition
    data: TextData
    batches: TrainBatches
    validation: ValidationBatches
    settings: StepSettings
    facts: dict[str, Any]
    processes: Processes
    verification: Verification
    callbacks: dict[str, Callback]

    @property
    def initial_state(self) -> Callable[[], TrainState]:
        """Makes the state before step 0 from the configuration alone: weights are drawn, not read."""
        return _initial_state(self.config, self.settings, self.data.tokenizer.vocab_size)

    def state_from(self, weights: LanguageModel) -> TrainState:
        """The state before step 0 on the devices, with weights from this host's memory."""
        start = Partial(TrainState.init, optimizer=self.settings.optimizer, policy=self.settings.policy)
        return self.partition.made(start, self.partition.place(weights))


def build_parts(
    config: TrainConfig, environment: Mapping[str, Any], console: Console, text: DataConfig | None = None
) -> Parts:
    """The parts of a run; its text is prepared.

    Args:
        config: the run.
        environment: what besides the configuration decides the numbers.
        console: receives progress lines.
        text: as the configuration's `data`, with paths that hold here; that itself if not given.

    Raises:
        InputError: if they do not fit each other or the data.
    """
    trainer, seq_len = config.trainer, config.model.seq_len
    partition = partition_of(config.mesh)
    mesh = partition.mesh
    check_mesh(config, mesh.size)
    attention_of(config, partition)
    callbacks, settings, text = build_callbacks(config), StepSettings.of(config), text or config.data
    if trainer.metrics:
        initial_state = _initial_state(config, settings, load_tokenizer(text.tokenizer).vocab_size)
        with partition.active():
            check_results(settings.metrics, partition.abstract(initial_state))
    data = prepare(text, console.line, warn=console.notice)
    check_mesh(config, mesh.size, data.tokenizer.vocab_size)
    for corpus in (data.train, data.validation):
        corpus.read(0, 1)  # of one that is kept in memory all is read here, before the run has a directory
    processes = Processes.of_this_run()
    devices = {"device": mesh.devices.flat[0].device_kind, "device_count": mesh.size}
    return Parts(
        config=config,
        partition=partition,
        data=data,
        batches=TrainBatches(
            data.train, seq_len=seq_len, batch_size=trainer.batch_size, seed=trainer.seed, changes=trainer.size_changes
        ),
        validation=ValidationBatches(
            data.validation,
            seq_len=seq_len,
            batch_size=trainer.microbatch_size or trainer.batch_size,
            max_windows=trainer.evaluation_windows,
        ),
        settings=settings,
        facts={
            "environment": {**environment, **devices},
            "data": data.train.facts,
            "validation": data.validation.facts,
            "code": code_version(),
        },
        processes=processes,
        callbacks=callbacks,
        verification=Verification([data.train, data.validation], cache_directory(config.data), processes),
    )


def _initial_state(config: TrainConfig, settings: StepSettings, vocab_size: int) -> Callable[[], TrainState]:
    return Partial(_build_state, config.model, settings, vocab_size, config.trainer.seed)


def _build_state(config: ModelConfig, settings: StepSettings, vocab_size: int, seed: int) -> TrainState:
    model = config.build(vocab_size=vocab_size, key=jax.random.key(seed))
    return TrainState.init(model, settings.optimizer, settings.policy)
