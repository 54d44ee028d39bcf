"""Runs whose attention and positions stop at the borders of documents: `data.mask_documents`."""

import re

import numpy as np
import pytest

from sophia_levanter import train
from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.commands import evaluate
from sophia_levanter.main import main
from sophia_levanter.training import loop
from tiny_runs import metrics

END = 256


def test_a_run_with_masks_its_evaluation_and_its_resume(config_file, tmp_path, monkeypatch, capfd):
    """Lines of text are its documents; their borders are somewhere in its sequences of 16 tokens."""
    batches = []

    def note(*arguments, **named):
        batches.append(batch_from_sequences(*arguments, **named))
        return batches[-1]

    monkeypatch.setattr(loop, "batch_from_sequences", note)
    run_dir = tmp_path / "run"
    settings = {"data.mask_documents": True, "data.document_separator": "\n", "trainer.num_train_steps": 2}
    settings["optimizer.type"] = "adamw"
    result = train(config_file, **settings, **{"trainer.run_dir": str(run_dir)})
    assert list(metrics(run_dir)) == [0, 1] and result.best_validation_loss == result.validation_loss
    for batch in batches:
        tokens, starts = (np.asarray(x.array).reshape(-1, 16) for x in (batch.tokens, batch.document_starts))
        rows, positions = np.nonzero(starts)
        assert len(rows) > 10
        assert np.all(tokens[rows, starts[rows, positions] - 1] == END)

    assert "\ndocuments: attention and positions restart at each document\n" in capfd.readouterr().out
    assert evaluate.main([str(run_dir), "--windows", "20"]) == 0
    masked = float(re.search(r"^loss +([\d.]+)", capfd.readouterr().out, re.MULTILINE)[1])
    assert masked == pytest.approx(result.validation_loss, abs=6e-5)
    resumed = train(resume=run_dir, **{"data.mask_documents": False})
    assert "data.mask_documents was True and is now False" in capfd.readouterr().out
    assert resumed.best_validation_loss is None  # those with masks do not compare


def test_tokens_without_documents_are_refused(config_file, tmp_path, capfd):
    for name in ("train", "val"):
        np.arange(END).repeat(20).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    words = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run"), "--data.mask_documents", "true"]
    words += ["--data.train", f"nanogpt:{tmp_path}/train.bin", "--data.validation", f"nanogpt:{tmp_path}/val.bin"]
    assert main(words) == 2
    assert capfd.readouterr().err == (
        "error: data.mask_documents is true, but data.train has no end-of-text token (id 256 in bytes) between "
        "documents; add one after each document, or set data.mask_documents to false\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_is_refused(config_file, plugin_folder, capfd):
    words = ["--config", str(config_file), "--plugins", "gru", "--model.type", "gru", "--data.mask_documents", "true"]
    assert main(words) == 2
    assert capfd.readouterr().err == (
        "error: data.mask_documents is true, but GRU cannot mask documents; set it to false or use a transformer\n"
    )
