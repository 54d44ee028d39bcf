"""What a run says of itself at its start and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax

from sophia_levanter.data.bigram import bigram_bits_per_byte
from sophia_levanter.models.config import Sampling, attention_for
from sophia_levanter.models.sampling import generate
from sophia_levanter.tracking.console import Console
from sophia_levanter.training.config import SophiaConfig, SophiaHConfig
from sophia_levanter.training.optimizers import curvature_share

if TYPE_CHECKING:
    from sophia_levanter.config import TrainConfig
    from sophia_levanter.partition.mesh import Partition
    from sophia_levanter.training.loop import Loop
    from sophia_levanter.training.run import Parts
    from sophia_levanter.training.step import TrainState

PROMPT_TOKENS = 32


def describe_start(parts: Parts, directory: Path, console: Console) -> None:
    """Print the model's, the data's and the step's sizes."""
    config, data = parts.config, parts.data
    trainer, model = config.trainer, config.model
    size = count_parameters(eqx.filter_eval_shape(parts.initial_state).model)
    console.line(
        f"model: GPT-2, {size:,} parameters, {model.num_layers} layers, {model.num_heads} heads, "
        f"{model.embed_dim} wide, {model.seq_len} positions, {data.tokenizer.vocab_size:,} tokens"
    )
    console.line(
        f"data: {data.train.num_tokens:,} training and {data.validation.num_tokens:,} validation tokens "
        f"({data.tokenizer.name})"
    )
    console.line(
        f"optimizer: {type(parts.settings.optimizer).__name__}, {trainer.num_train_steps:,} steps of "
        f"{trainer.batch_size} x {model.seq_len} tokens in {trainer.num_microbatches} microbatch(es), "
        f"on {describe_mesh(parts.partition)}"
    )
    for step, size in trainer.size_changes:
        console.line(f"batch size: {size} from step {step:,} on")
    attention = attention_of(config, parts.partition)
    swapped = isinstance(config.optimizer, SophiaHConfig) and attention != "xla"
    console.line(
        f"attention: {attention}"
        + (", and xla in the curvature's pass, which needs a forward derivative" if swapped else "")
    )
    if isinstance(config.optimizer, SophiaConfig):
        share = curvature_share(config.optimizer, trainer)
        first = config.optimizer.initial_refreshes
        console.line(
            f"curvature: every {config.optimizer.interval} steps, on {share:.0%} of the batch"
            + (f", at each of the first {first} steps" if first else "")
            + (", in a Kronecker basis" if config.optimizer.basis == "kronecker" else "")
        )
    console.line(f"run directory: {directory}")


def attention_of(config: TrainConfig, partition: Partition) -> str:
    """The implementation of attention that a run uses.

    Raises:
        InputError: if the one that is asked for cannot be used on these devices.
    """
    model = config.model
    return attention_for(
        model.attention,
        partition.platform,
        config.trainer.compute_dtype,
        model.seq_len,
        model.embed_dim // model.num_heads,
        split_positions=partition.mesh.shape["sequence"] > 1,
        dropout=model.dropout > 0,
    )


def describe_mesh(partition: Partition) -> str:
    """`8 TPU v4 device(s), data 4 x model 2, embed over data`."""
    mesh = partition.mesh
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    split = [f"{name} over {' and '.join(over)}" for name, over in partition.parameters.items() if "data" in over]
    parts = [f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s)"]
    if axes:
        parts += [axes, *(s for s in split if not s.startswith("batch"))]
    return ", ".join(parts)


def describe_end(parts: Parts, loop: Loop, state: TrainState, console: Console) -> None:
    """Print the losses beside a byte-bigram's, the speed, where the checkpoint lies, and a sample of text."""
    numbers, tokenizer = loop.last_metrics, parts.data.tokenizer
    bigram = bigram_bits_per_byte(parts.data.train, parts.validation.token_windows(), tokenizer)
    console.line(
        f"done: {int(state.step):,} steps, {loop.tokens_per_second:,.0f} tokens/s, "
        f"{loop.waited_steps} step(s) waited for data"
    )
    console.line(
        f"validation: {numbers['validation/loss']:.4f} nats per token, "
        f"{numbers['validation/bits_per_byte']:.4f} bits per byte; "
        f"a byte-bigram model of the same training text needs {bigram:.4f}"
    )
    if "optim/win_rate" in numbers:
        console.line(f"win rate: {numbers['optim/win_rate']:.1%} of the coordinates took an unclipped step")
    console.line(f"checkpoint: {loop.saved}")
    if parts.config.trainer.sample_tokens:
        console.line(f"sample, after the prompt in brackets:\n{_sample(parts, state)}")


def _sample(parts: Parts, state: TrainState) -> str:
    data, trainer = parts.data, parts.config.trainer
    prompt = data.validation.read(0, min(PROMPT_TOKENS, data.validation.num_tokens))
    keys = jax.random.key(trainer.seed)[None]
    with parts.partition.active():
        model = jax.jit(parts.settings.policy.cast_to_compute)(state.model)
        steps = generate(model, [prompt.tolist()], trainer.sample_tokens, keys=keys, sampling=Sampling())
        drawn = [token for row in steps for token in row if token is not None]
    text = f"[{data.tokenizer.decode(prompt)}]{data.tokenizer.decode(drawn)}"
    # A model of bytes may well draw what a terminal takes for a command.
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def count_parameters(model: object) -> int:
    """The number of floating-point parameters, padding of the vocabulary included."""
    leaves = jax.tree.leaves(
        eqx.filter(model, lambda x: eqx.is_inexact_array(x) or isinstance(x, jax.ShapeDtypeStruct))
    )
    return sum(leaf.size for leaf in leaves)
