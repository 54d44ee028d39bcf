"""Benchmarks of language models: their formats, and scores against logits computed text by text."""

import json
import math
from unittest.mock import MagicMock

import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from sophia_levanter.commands import evaluate
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.trainer import TASKS, TaskConfig, TrainerConfig
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.models import attention
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training import tasks
from sophia_levanter.training.callbacks import Monitor, Pause, Saving
from sophia_levanter.training.tasks import _FORMATS, Item, Scoring, TaskResult, TaskScorer, read_items, read_tasks

HELLASWAG = {
    "activity_label": "Removing ice from car",
    "ctx_a": "A man [substeps] scrapes  the window.",
    "ctx_b": "then he",
    "endings": ["drives [title] away.", "sleeps.", "sings.", "eats [header] ice."],
    "label": 3,
}
PIQA = {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Eat the lid.", "label": 0}
HUB_ARC = {"question": "What melts?", "choices": {"text": ["Ice", "Sand"], "label": ["1", "2"]}, "answerKey": "2"}
ARC = {
    "question": {"stem": "What melts?", "choices": [{"text": "Ice", "label": "A"}, {"text": "Sand", "label": "B"}]},
    "answerKey": "A",
}


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "items.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.mark.parametrize(
    ("task", "record", "item"),
    [
        (
            "hellaswag",
            HELLASWAG,
            Item(
                "Removing ice from car: A man scrapes the window. Then he",
                (" drives. away.", " sleeps.", " sings.", " eats ice."),
                3,
            ),
        ),
        ("piqa", PIQA, Item("Question: Open a jar\nAnswer:", (" Turn the lid.", " Eat the lid."), 0)),
        ("arc", ARC, Item("Question: What melts?\nAnswer:", (" Ice", " Sand"), 0)),
        ("arc", HUB_ARC, Item("Question: What melts?\nAnswer:", (" Ice", " Sand"), 1)),
        ("lambada", {"text": "She said that he was gone"}, Item("She said that he was", (" gone",), 0)),
    ],
)
def test_formats(task, record, item, write):
    assert read_items(task, write(record, record)) == [item, item]


@pytest.mark.parametrize(
    ("task", "text", "problem"),
    [
        ("piqa", "", "the file contains no items"),
        ("piqa", json.dumps(PIQA) + "\n{", "line 2 is not a valid piqa item: JSONDecodeError"),
        ("piqa", json.dumps(PIQA | {"label": 2}), "line 1 is not a valid piqa item: its answer has no text"),
        ("arc", json.dumps(PIQA), "line 1 is not a valid arc item: KeyError('question')"),
        ("arc", json.dumps(ARC | {"answerKey": "Z"}), "line 1 is not a valid arc item: ValueError"),
        ("arc", "[" * 100_000, "line 1 is not a valid arc item: RecursionError"),
        ("lambada", '"text"', "line 1 is not a valid lambada item: TypeError"),
    ],
)
def test_a_bad_file_is_one_line(task, text, problem, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_items(task, path)
    assert str(error.value).startswith(f"--file {path}: {problem}")


def test_characters_that_end_lines_elsewhere_do_not_end_items(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(PIQA | {"goal": "Open\u2028a jar"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (item,) = read_items("piqa", path)
    assert item.context == "Question: Open\u2028a jar\nAnswer:"


@jax.jit
def log_softmax_of_row(model, tokens):
    logits = model(hax.named(tokens, "position")).rearrange(("position", "vocab")).array
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def log_softmax(model, tokens):
    """float32 [position, token], of one text. It does not see the zeros after it, which make all rows equally long."""
    row = np.zeros(model.config.seq_len, np.int32)
    row[: len(tokens)] = tokens
    return np.asarray(log_softmax_of_row(model, row))[: len(tokens)]


def log_probabilities(model, context, choice, seq_len):
    """Token by token of the choice, of one text, and whether each is the likeliest."""
    tokens = list((context + choice).encode())[-(seq_len + 1) :]
    logs = log_softmax(model, tokens[:-1])
    places = range(len(tokens) - 1 - min(len(choice), seq_len), len(tokens) - 1)
    return [float(logs[i, tokens[i + 1]]) for i in places], all(int(logs[i].argmax()) == tokens[i + 1] for i in places)


def test_scores_are_those_of_each_text_by_itself(make_model):
    """Some texts are longer than the context."""
    model = make_model(vocab_size=257, seq_len=28)
    rng = np.random.default_rng(0)
    words = ["ice", "a lid", "window", "it melts", "nobody knows why it did not"]
    items = [
        Item(f"Question {number}: {words[number % 5]}", tuple(f" {w}" for w in rng.permutation(words)), number % 5)
        for number in range(20)
    ]
    right = normalized = 0
    for item in items:
        sums = np.array([sum(log_probabilities(model, item.context, choice, 28)[0]) for choice in item.choices])
        right += np.argmax(sums) == item.answer
        normalized += np.argmax(sums / [len(choice) - 1 for choice in item.choices]) == item.answer
    partition = partition_of()
    scorer = TaskScorer(ByteTokenizer(), partition, jmp.get_policy("float32"))
    assert scorer(items, partition.place(model)) == TaskResult(20, right / 20, normalized / 20)
    assert 0 < right < 20 and right != normalized


def test_a_choice_longer_than_the_context_is_refused(make_model):
    """Only its end could be scored, which has a higher probability than all of it."""
    scorer = TaskScorer(ByteTokenizer(), partition_of(devices=jax.devices()[:1]), jmp.get_policy("float32"))
    with pytest.raises(InputError) as error:
        scorer([Item("Why?", (" no", " nobody knows why it did not"))], make_model(vocab_size=257, seq_len=24))
    assert str(error.value) == "model.seq_len is 24, but a choice of a task has 28 tokens; use a longer context"


def test_a_model_that_computes_nan_has_no_scores(make_model):
    model = jax.tree.map(lambda x: x * jnp.nan, make_model(vocab_size=257, seq_len=24))
    scorer = TaskScorer(ByteTokenizer(), partition_of(devices=jax.devices()[:1]), jmp.get_policy("float32"))
    assert math.isnan(scorer([Item("Why?", (" no", " yes"))], model).accuracy)
    assert math.isnan(scorer([Item("He was", (" gone",))], model).accuracy)


def test_rows_are_split_over_devices_by_position(make_model):
    """Rows of 32 tokens would not divide over three devices."""
    model, item = make_model(vocab_size=257, seq_len=96), Item("Why?", (" no", " yes"))
    scores = [
        TaskScorer(ByteTokenizer(), partition, jmp.get_policy("float32"))([item], partition.place(model))
        for partition in [partition_of(MeshConfig(sequence=n), jax.devices()[:n]) for n in (1, 3)]
    ]
    assert scores[0] == scores[1]


def test_last_words(make_model):
    model, partition = make_model(vocab_size=257, seq_len=24), partition_of(devices=jax.devices()[:1])
    likely = log_softmax(model, list(b"He said"))[-1].argmax()
    contexts = ["He said", "Nobody ever knew what it was that she had", ""]
    items = [
        Item(context, (word,)) for context, word in zip(contexts, (chr(int(likely) % 128), " seen", "a"), strict=True)
    ]
    found = TaskScorer(ByteTokenizer(), partition, jmp.get_policy("float32"))(items, model)
    logs, greedy = zip(
        *(log_probabilities(model, c or "\0", item.choices[0], 24) for c, item in zip(contexts, items, strict=True)),
        strict=True,
    )
    # Without a context, end-of-text is before the first token.
    ended = log_softmax(model, [256])[0, ord("a")]
    sums = [sum(logs[0]), sum(logs[1]), float(ended)]
    assert found.perplexity == pytest.approx(math.exp(-np.mean(sums)), rel=1e-4)
    assert found.accuracy >= sum(greedy[:2]) / 3 and found.normalized_accuracy is None


@pytest.mark.parametrize(("implementation", "length"), [("splash", 128), ("auto", 32)])
def test_rows_are_as_long_as_the_attention_needs(make_model, monkeypatch, implementation, length):
    lengths = []

    def attend(q, k, v, starts):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def score(partition, policy, model, inputs, *rest):
        lengths.append(inputs.resolve_axis("position").size)
        return score_rows(partition, policy, model, inputs, *rest)

    score_rows = tasks._score_rows
    monkeypatch.setattr(tasks, "_score_rows", score)
    monkeypatch.setattr(attention, "_splash", attend)
    monkeypatch.setattr(attention, "active_platform", lambda: "tpu")
    scorer = TaskScorer(ByteTokenizer(), partition_of(devices=jax.devices()[:1]), jmp.get_policy("float32"))
    scorer([Item("He was", (" gone",))], make_model(vocab_size=257, seq_len=256, attention=implementation))
    assert lengths == [length]


def test_the_interval_of_a_share():
    assert TaskResult(101, 0.5).interval(0.5) == pytest.approx(0.098)


def test_the_command(finished_run, write, capfd):
    path = write(*[PIQA, PIQA | {"label": 1}] * 5)
    assert evaluate.main([str(finished_run.path), "--task", "piqa", "--file", str(path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"model          step 12 of {finished_run.path}"
    assert lines[1:] == [
        f"task           piqa, 10 questions from {path}",
        "accuracy       0.5000 ± 0.3267",
        "normalized     0.5000 ± 0.3267",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "squad", "--file", "F"], "--task is 'squad'; it must be one of hellaswag, piqa, arc, lambada"),
        (["--task", "piqa"], "--task NAME and --file FILE must be given together; one of them is missing"),
        (["--file", "F"], "--task NAME and --file FILE must be given together; one of them is missing"),
        (
            ["--task", "piqa", "--file", "F", "--windows", "3"],
            "--windows and --batch_size cannot be combined with --task",
        ),
        (["--task", "piqa", "--file", "nowhere.jsonl"], "--file nowhere.jsonl cannot be read: "),
    ],
)
def test_bad_options(words, message, capfd):
    assert evaluate.main(["MODEL", *words]) == 2
    assert capfd.readouterr().err.startswith(f"error: {message}")


def test_the_tasks_of_a_run(write, tmp_path):
    path = str(write(PIQA, PIQA))
    found = read_tasks([TaskConfig("piqa", path), TaskConfig("piqa", path, "again")])
    assert list(found) == ["piqa", "again"] and len(found["again"]) == 2
    with pytest.raises(InputError) as error:
        read_tasks([TaskConfig("piqa", path), TaskConfig("arc", path, "easy")])
    assert str(error.value) == f"trainer.tasks: easy: {path}: line 1 is not a valid arc item: KeyError('question')"
    with pytest.raises(InputError, match=r"^trainer\.tasks: piqa: /nowhere cannot be read: "):
        read_tasks([TaskConfig("piqa", "/nowhere")])
    assert read_tasks([]) == {} and set(_FORMATS) == set(TASKS)


def test_tasks_are_scored_at_their_own_cadence_and_at_the_end():
    config = TrainerConfig(num_train_steps=10, tasks_every=4, evaluate_every=3)
    monitor = Monitor(MagicMock(), MagicMock(), MagicMock())
    results = {"a": TaskResult(101, 0.5, 0.25), "b": TaskResult(5, 0.0, perplexity=9.0)}
    scoring = Scoring(config, monitor, lambda items, model, advance: results[items[0]], {"a": ["a"], "b": ["b"]})
    assert [done for done in range(1, 11) if scoring.is_due(done)] == [4, 8, 10]
    assert not Scoring(config, monitor, None, {}).is_due(10)
    pause = Pause(4, MagicMock(), lambda: False)
    scoring.on_pause(pause)
    assert pause.scored and not pause.evaluated
    monitor.console.line.assert_called_once_with(
        "step 4: a accuracy 0.5000 ± 0.0980, normalized accuracy 0.2500 ± 0.0849; "
        "b accuracy 0.0000 ± 0.0000, perplexity 9.00"
    )
    ((step, numbers), _) = monitor.trackers.log.call_args
    assert step == 3 and numbers == {
        "tasks/a/accuracy": 0.5,
        "tasks/a/accuracy_interval": results["a"].interval(0.5),
        "tasks/a/normalized_accuracy": 0.25,
        "tasks/a/normalized_accuracy_interval": results["a"].interval(0.25),
        "tasks/b/accuracy": 0.0,
        "tasks/b/accuracy_interval": 0.0,
        "tasks/b/perplexity": 9.0,
    }
    assert [call.args for call in monitor.watchdog.begin.call_args_list] == [
        ("scoring a after step 4",),
        ("scoring b after step 4",),
    ]


@pytest.mark.parametrize("scored", [True, False])
def test_scores_are_saved_with_the_state_that_has_them(scored):
    monitor, checkpoints = Monitor(MagicMock(), MagicMock(), MagicMock()), MagicMock()
    monitor.trackers.last = {"train/loss": 3.0, "tasks/a/accuracy": 0.5}
    saving = Saving(TrainerConfig(), monitor, checkpoints, MagicMock(), MagicMock(), MagicMock())
    saving.save(Pause(7, MagicMock(), lambda: False, scored=scored))
    (step, _, numbers), _ = checkpoints.save.call_args
    assert step == 7 and set(numbers) == {"train/loss", *(["tasks/a/accuracy"] if scored else [])}


def test_a_model_that_has_diverged_does_not_end_the_run(make_model):
    """Its perplexity is beyond float64."""
    scorer = TaskScorer(ByteTokenizer(), partition_of(devices=jax.devices()[:1]), jmp.get_policy("float32"))
    scorer._log_probabilities = lambda rows, *_: [(-1e6, False) for _ in rows]
    assert scorer([Item("He was", (" gone",))], make_model(vocab_size=257)).perplexity == math.inf
