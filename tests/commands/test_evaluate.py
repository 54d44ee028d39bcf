"""`evaluate`: the loss of a run's model, or of an exported one, on a text."""

import re
import shutil
from itertools import pairwise

import equinox as eqx
import haliax as hax
import jax
import numpy as np
import pytest

from sophia_levanter.commands import evaluate
from sophia_levanter.data import batches as batches_module
from sophia_levanter.data.bpe import save_bpe, train_bpe
from sophia_levanter.run.loading import load_model
from tiny_runs import metrics


@pytest.fixture
def evaluated(trained, capsys):
    """The figures that the command prints for the run or another model; a loss of four digits is too coarse."""

    def run(place="run", *words):
        capsys.readouterr()
        assert evaluate.main([str(trained / place), *words]) == 0
        shown = capsys.readouterr().out
        figures = dict(re.findall(r"^(loss|perplexity|bits per byte|tokens) +([\d.,]+)", shown, re.MULTILINE))
        figures["bytes"] = re.search(r"for ([\d,]+) bytes of text", shown)[1]
        return {name: float(value.strip(",").replace(",", "")) for name, value in figures.items()}, shown

    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A text that the run was not trained on."""
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text("Another text, of 300 or so bytes.\n" * 9)
    return path


@pytest.fixture(scope="module")
def own_mean(trained, other):
    """Sum of the losses and number of tokens of the other text, window by window on one device."""
    loaded = load_model(str(trained / "run"), report=print)
    model = jax.device_put(loaded.model, jax.devices()[0])
    logits_of = eqx.filter_jit(lambda model, ids: model(hax.named(ids, "position")).array)
    ids = np.array([*other.read_bytes(), 256], np.int32)
    nats = count = 0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits = logits_of(model, np.pad(window[:-1], (0, 17 - len(window))))
        chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(window) - 1), window[1:]]
        nats, count = nats - float(chosen.sum()), count + len(window) - 1
    return nats, count


def test_it_is_the_runs_own_validation_loss(trained, evaluated):
    loss, bits = (metrics(trained / "run", f"validation/{name}")[11] for name in ("loss", "bits_per_byte"))
    figures, shown = evaluated("run", "--windows", "10")
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["bits per byte"] == pytest.approx(bits, abs=1e-4)
    assert f"step 12 of {trained / 'run'}\n" in shown
    assert f"text           the held-out part of {trained / 'text.txt'}, tokenizer bytes\n" in shown
    earlier, _ = evaluated("run", "--windows", "10", "--step", "6")
    assert earlier["loss"] > figures["loss"] + 0.01


def test_masked_documents_are_read_alone(trained, other, evaluated):
    """Each line by itself, as far as it is in one sequence; a mesh that splits positions has another attention."""
    loaded = load_model(str(trained / "run"), report=print)
    model = jax.device_put(loaded.model, jax.devices()[0])
    ids = np.array([id for line in other.read_bytes().splitlines() for id in (*line, 256)], np.int32)
    rows, targets, weights = (np.zeros((60, 16), np.int32) for _ in range(3))
    row, column = 0, 0
    for number, (token, target) in enumerate(pairwise(ids)):
        if number and (number % 16 == 0 or ids[number - 1] == 256):
            row, column = row + 1, 0
        rows[row, column], targets[row, column], weights[row, column] = token, target, 1
        column += 1
    logits = eqx.filter_jit(lambda model, ids: model(hax.named(ids, ("batch", "position"))).array)(model, rows)
    logs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    nats = -(logs * weights).sum() / weights.sum()
    options = ["--data.validation", str(other), "--data.document_separator", "\n", "--data.mask_documents", "true"]
    for mesh in ([], ["--mesh.data", "2", "--mesh.sequence", "4"]):
        masked, _ = evaluated("run", *options, *mesh)
        assert masked["tokens"] == weights.sum()
        assert masked["loss"] == pytest.approx(nats, abs=6e-5)


MESHES = {
    "a batch that does not divide": ["--batch_size", "3"],
    "tensors split": ["--mesh.data", "4", "--mesh.model", "2", "--mesh.fsdp", "embed"],
}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_token_counts_once_whatever_the_mesh_and_the_batch(mesh, other, own_mean, evaluated):
    size = other.stat().st_size
    nats, count = own_mean
    figures, _ = evaluated("run", "--data.validation", str(other), *MESHES[mesh])
    assert figures["tokens"] == count == size
    assert figures["bytes"] == size - 1  # the first is not predicted, and end-of-text has none
    assert figures["loss"] == pytest.approx(nats / count, abs=6e-5)
    assert figures["bits per byte"] == pytest.approx(nats / np.log(2) / (count - 1), abs=6e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(nats / count), abs=6e-3)


def test_a_batch_is_no_larger_than_the_text(trained, evaluated, monkeypatch):
    sizes = []
    batches = batches_module.ValidationBatches

    def note(*arguments, batch_size, **named):
        sizes.append(batch_size)
        return batches(*arguments, batch_size=batch_size, **named)

    monkeypatch.setattr(batches_module, "ValidationBatches", note)
    figures, _ = evaluated("run", "--windows", "3", "--batch_size", "999999999")
    assert sizes == [8] and figures["tokens"] == 48


def test_no_memory_is_one_line(trained, monkeypatch, capsys):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    monkeypatch.setattr(evaluate, "_evaluate", fail)
    assert evaluate.main([str(trained / "run")]) == 1
    assert capsys.readouterr().err.endswith("error: RESOURCE_EXHAUSTED: Out of memory\n")


def test_an_exported_model_on_a_text(trained, other, evaluated):
    text = ["--data.validation", str(other), "--data.cache_dir", str(trained / "cache")]
    ours, _ = evaluated("run", *text)
    theirs, shown = evaluated("exported", *text)
    assert theirs == ours
    assert f"text           {other}, tokenizer bytes\n" in shown
    coarse, _ = evaluated("exported", *text, "--trainer.compute_dtype", "bfloat16")
    assert coarse["loss"] == pytest.approx(ours["loss"], rel=0.02)


BAD = {
    "no model": ([], "expected one MODEL, found 0"),
    "two models": (["a", "b"], "expected one MODEL, found 2"),
    "no windows": (["RUN", "--windows", "0"], "--windows is 0; it must be at least 1"),
    "no batch": (["RUN", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
    "no number": (["RUN", "--windows", "all"], "--windows is 'all'; it must be an integer"),
    "nowhere": (["nowhere"], "nowhere does not exist"),
    "a folder without a text": (["FOLDER"], "--data.validation TEXT is missing: FOLDER is not a run"),
    "no such text": (["RUN", "--data.validation", "nowhere.txt"], "nowhere.txt"),
    "another vocabulary": (
        ["RUN", "--data.tokenizer", "WORDS"],
        "WORDS differs from the one that RUN was trained with",
    ),
    "another vocabulary in a folder": (
        ["FOLDER", "--data.tokenizer", "WORDS"],
        "WORDS differs from the one that FOLDER was trained with; set --data.tokenizer bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, wanted = BAD[name]
    places = {"RUN": trained / "run", "FOLDER": trained / "exported", "WORDS": tmp_path / "words.tiktoken"}
    if "WORDS" in words:
        save_bpe(places["WORDS"], train_bpe(["the other anthem " * 9], 270))
    for short, place in places.items():
        words, wanted = [word.replace(short, str(place)) for word in words], wanted.replace(short, str(place))
    assert evaluate.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert wanted in error


def test_a_damaged_step_is_a_failure(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000012/manifest.json").write_text("{}")
    assert evaluate.main([str(tmp_path / "run"), "--step", "12"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_progress_is_told_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    advance = evaluate._progress(5)
    for _ in range(5):
        advance()
    assert capsys.readouterr().err == "2 of 5 batches\n4 of 5 batches\n"
