"""Language model benchmarks: multiple-choice questions scored by likelihood, and last-word prediction.

Prompts, continuations and scores match EleutherAI's lm-evaluation-harness 0.4. The score of a choice is the total
log-probability of its tokens given the context. The normalized score is the score divided by the length of the choice
in characters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sophia_levanter.config.trainer import TaskConfig, TrainerConfig
from sophia_levanter.data.tokenizer import Tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.files import read_regular
from sophia_levanter.models.attention import SPLASH_STEP
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.partition.mesh import Partition, by_row_shard
from sophia_levanter.partition.processes import check_agreement
from sophia_levanter.training.callbacks import Callback, Monitor, Pause

MOST_BYTES = 1 << 30  # maximum size of a task file, in bytes
ROWS_PER_DEVICE = 8
LENGTH_STEP = 32  # rows are padded to a multiple of this length, except for splash attention


@dataclass(frozen=True)
class Item:
    """A benchmark item, such as a multiple-choice question.

    Attributes:
        context: the text before the choices.
        choices: the possible continuations of the context. A last-word item has only one.
        answer: the index of the correct choice.
    """

    context: str
    choices: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True)
class TaskResult:
    """The scores of a model on a task.

    Attributes:
        num_items: number of items.
        accuracy: fraction of correct answers. A last word is correct if each of its tokens is the most likely one.
        normalized_accuracy: fraction of correct answers by normalized score; None for last-word tasks.
        perplexity: exp of the mean negative log-probability of the last words; None for multiple-choice tasks.
    """

    num_items: int
    accuracy: float
    normalized_accuracy: float | None = None
    perplexity: float | None = None

    def interval(self, share: float) -> float:
        """Return the half-width of the 95% confidence interval for an accuracy, using the normal approximation."""
        return 1.96 * math.sqrt(share * (1 - share) / max(1, self.num_items - 1))

    @property
    def shares(self) -> dict[str, float]:
        """The accuracies that apply to the task, keyed by name."""
        found = {"accuracy": self.accuracy, "normalized_accuracy": self.normalized_accuracy}
        return {name: share for name, share in found.items() if share is not None}

    @property
    def numbers(self) -> dict[str, float]:
        """The accuracies, their intervals (such as `accuracy_interval`) and, for last-word tasks, the perplexity."""
        found = dict(self.shares)
        found |= {f"{name}_interval": self.interval(share) for name, share in self.shares.items()}
        return found if self.perplexity is None else {**found, "perplexity": self.perplexity}


def _hellaswag(record: Mapping[str, Any]) -> Item:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Item(clean(context), tuple(f" {clean(ending)}" for ending in record["endings"]), int(record["label"]))


def _piqa(record: Mapping[str, Any]) -> Item:
    choices = (f" {record['sol1']}", f" {record['sol2']}")
    return Item(f"Question: {record['goal']}\nAnswer:", choices, int(record["label"]))


def _arc(record: Mapping[str, Any]) -> Item:
    """Parse an ARC record. The original files nest the choices in the question; Hugging Face uses separate lists."""
    question: Any = record["question"]
    choices: Any = record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    answer = choices["label"].index(record["answerKey"])
    return Item(f"Question: {question}\nAnswer:", tuple(f" {text}" for text in choices["text"]), answer)


def _lambada(record: Mapping[str, Any]) -> Item:
    context, _, word = record["text"].rpartition(" ")
    return Item(context, (f" {word}",))


_FORMATS: dict[str, Callable[[Mapping[str, Any]], Item]] = {
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "arc": _arc,
    "lambada": _lambada,
}


def read_tasks(tasks: Sequence[TaskConfig]) -> dict[str, list[Item]]:
    """Read the items of each task, keyed by task title. All processes must call this function together.

    Raises:
        InputError: if a file cannot be read, a line is not a valid item, or the files differ between processes.
    """
    found = {task.title: read_items(task.task, Path(task.file), f"trainer.tasks: {task.title}:") for task in tasks}
    if found:
        check_agreement("the content of trainer.tasks", repr(found))
    return found


def read_items(task: str, path: Path, field: str = "--file") -> list[Item]:
    """Read a task's items from a JSON Lines file.

    Raises:
        InputError: if the file cannot be read or contains no items, or a line is not a valid item for the task. The
            message names the line and `field`, the setting that specifies the file.
    """
    try:
        lines = read_regular(path, MOST_BYTES).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{field} {path} cannot be read: {error}") from None
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _FORMATS[task](json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise InputError(f"{field} {path}: line {number} is not a valid {task} item: {error!r}") from None
        if not 0 <= item.answer < len(item.choices) or not all(choice.strip() for choice in item.choices):
            raise InputError(f"{field} {path}: line {number} is not a valid {task} item: its answer has no text")
        items.append(item)
    if not items:
        raise InputError(f"{field} {path}: the file contains no items")
    return items


class _Row(NamedTuple):
    """The tokens of a context and its continuation. The last `length` tokens belong to the continuation."""

    tokens: np.ndarray
    length: int


@dataclass(eq=False)
class TaskScorer:
    """Scores models of the same shape on tasks. `policy` sets the dtypes for parameters and computation."""

    tokenizer: Tokenizer
    partition: Partition
    policy: jmp.Policy

    def __call__(
        self, items: Sequence[Item], model: LanguageModel, on_progress: Callable[[], None] = lambda: None
    ) -> TaskResult:
        """Score a model on the items of one task. Contexts are truncated on the left to fit the model's context.

        If the model computes a NaN, so are the scores.

        Raises:
            InputError: if a choice is longer than the model's context.
        """
        found = list(self._log_probabilities(rows_of(items, self.tokenizer, model.config.seq_len), model, on_progress))
        if any(math.isnan(log) for log, _ in found):
            return TaskResult(len(items), math.nan)
        if all(len(item.choices) == 1 for item in items):
            accuracy = np.mean([greedy for _, greedy in found])
            with np.errstate(over="ignore"):
                perplexity = np.exp(-np.mean([log for log, _ in found]))
            return TaskResult(len(items), float(accuracy), perplexity=float(perplexity))
        logs = iter(log for log, _ in found)
        right, normalized = [], []
        for item in items:
            own = np.array([next(logs) for _ in item.choices])
            lengths = [len(choice) - 1 for choice in item.choices]  # without the leading space
            right.append(np.argmax(own) == item.answer)
            normalized.append(np.argmax(own / lengths) == item.answer)
        return TaskResult(len(items), float(np.mean(right)), float(np.mean(normalized)))

    def _log_probabilities(
        self, rows: Sequence[_Row], model: LanguageModel, on_progress: Callable[[], None]
    ) -> Iterator[tuple[float, bool]]:
        """For each row, yield the log-probability of its continuation, and whether greedy decoding produces it."""
        size = ROWS_PER_DEVICE * self.partition.row_shards
        longest = max(len(row.tokens) for row in rows) - 1
        # Models from plug-ins may have no attention.
        step = SPLASH_STEP if getattr(model.config, "attention", None) == "splash" else LENGTH_STEP
        step = math.lcm(step, self.partition.mesh.shape["sequence"])
        length = min(-(-longest // step) * step, model.config.seq_len)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            inputs, targets = np.zeros((2, size, length), np.int32)
            counted = np.zeros((size, length), np.float32)
            for number, row in enumerate(part):
                end = len(row.tokens) - 1
                inputs[number, :end], targets[number, :end] = row.tokens[:-1], row.tokens[1:]
                counted[number, end - row.length : end] = 1
            with self.partition.active():
                named = [hax.named(array, ("batch", "position")) for array in (inputs, targets, counted)]
                arrays = _score_rows(self.partition, self.policy, model, *self.partition.place(named))
            logs, greedy = (np.asarray(array)[: len(part)].tolist() for array in arrays)
            yield from zip(logs, greedy, strict=True)
            on_progress()


def rows_of(items: Sequence[Item], tokenizer: Tokenizer, seq_len: int) -> list[_Row]:
    """Encode every choice of every item.

    Raises:
        InputError: if a choice has more than `seq_len` tokens, because a part of it cannot be compared with the others.
    """
    rows = [_row(item.context, choice, tokenizer, seq_len) for item in items for choice in item.choices]
    if (longest := max(row.length for row in rows)) > seq_len:
        raise InputError(
            f"model.seq_len is {seq_len}, but a choice of a task has {longest} tokens; use a longer context"
        )
    return rows


def _row(context: str, choice: str, tokenizer: Tokenizer, seq_len: int) -> _Row:
    """Encode the context and the choice together, because tokens may span the boundary.

    If the context alone has n tokens, the choice consists of all tokens after the first n.
    """
    bare = context.rstrip()
    before = tokenizer.encode(bare)
    whole = tokenizer.encode(context + choice)
    if not len(before):
        whole = np.concatenate([[tokenizer.end_of_text], whole])
        before = whole[:1]
    return _Row(whole[-(seq_len + 1) :].astype(np.int32), len(whole) - len(before))


@eqx.filter_jit
def _score_rows(
    partition: Partition,
    policy: jmp.Policy,
    model: LanguageModel,
    inputs: hax.NamedArray,
    targets: hax.NamedArray,
    counted: hax.NamedArray,
) -> tuple[jax.Array, jax.Array]:
    """Compute the results of `_log_probabilities` for a batch of rows, and replicate them on every device.

    Each device scores its rows one at a time, because the logits of all rows may not fit in memory. The partition must
    be active, because compilation depends on it.
    """
    model = policy.cast_to_compute(model).gathered()
    hidden = model.final_hidden(inputs, None).rearrange(("batch", "position", "embed"))

    def one(row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, wanted, weights = row
        logits = (
            model.head(hax.named(states, ("position", "embed")), jnp.float32).rearrange(("position", "vocab")).array
        )
        logs = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], axis=-1)[:, 0]
        is_likeliest = jnp.all((jnp.argmax(logits, axis=-1) == wanted) | (weights == 0))
        return jnp.sum(logs * weights), is_likeliest

    arrays = (hidden.array, targets.array, counted.array)
    shards = by_row_shard(tuple(array.reshape(partition.row_shards, -1, *array.shape[1:]) for array in arrays))
    logs, greedy = jax.vmap(lambda *rows: jax.lax.map(one, rows))(*shards)
    whole = NamedSharding(partition.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint((logs.ravel(), greedy.ravel()), whole)


@dataclass
class Scoring(Callback):
    """Scores the model on tasks during a run.

    Attributes:
        tasks: the items of each task, keyed by task title, in the same order in all processes.
    """

    config: TrainerConfig
    monitor: Monitor
    scorer: TaskScorer
    tasks: Mapping[str, Sequence[Item]]

    def is_due(self, done: int) -> bool:
        is_last = done == self.config.num_train_steps
        return bool(self.tasks) and (is_last or done % self.config.tasks_interval == 0)

    def on_pause(self, pause: Pause) -> None:
        numbers: dict[str, float] = {}
        shown = []
        for name, items in self.tasks.items():
            advance = partial(self.monitor.watchdog.begin, f"scoring {name} after step {pause.done}")
            advance()
            result = self.scorer(items, pause.state.model, advance)
            numbers |= {f"tasks/{name}/{key}": value for key, value in result.numbers.items()}
            shares = [f"{key.replace('_', ' ')} {x:.4f} ± {result.interval(x):.4f}" for key, x in result.shares.items()]
            shares += [] if result.perplexity is None else [f"perplexity {result.perplexity:,.2f}"]
            shown.append(f"{name} {', '.join(shares)}")
        pause.scored = True
        self.monitor.console.line(f"step {pause.done}: {'; '.join(shown)}")
        self.monitor.trackers.log(pause.done - 1, numbers)
