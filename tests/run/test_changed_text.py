"""Text that is damaged, or changes under a run: what was trained on sound text is saved, and nothing else."""

import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from sophia_levanter import checkpoint
from sophia_levanter.config.command_line import load_config
from sophia_levanter.data import corpora, token_store
from sophia_levanter.data.corpora import Leak, prepare
from sophia_levanter.data.nanogpt import NanogptTokens
from sophia_levanter.main import main
from sophia_levanter.run.resuming import _is_same_text
from tiny_runs import metrics


@pytest.fixture
def of_tokens(config_file, tmp_path):
    """The command of a run on token files of 5,000 tokens; other.bin is as long as train.bin."""
    rng = np.random.default_rng(0)
    for name in ("train", "val", "other"):
        rng.integers(0, 257, 5000).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    data = ["--data.train", f"nanogpt:{tmp_path}/train.bin", "--data.validation", f"nanogpt:{tmp_path}/val.bin"]
    return ["--config", str(config_file), *data, "--trainer.run_dir", str(tmp_path / "run")]


def test_a_damaged_store_is_found_before_the_run_has_a_directory(config_file, tmp_path, capfd):
    prepare(load_config(config_file).data, print)
    (shard,) = (tmp_path / "cache").glob("*/validation/tokens/c/0")
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    capfd.readouterr()
    assert main(["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]) == 2
    assert "damaged" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("side", ["train", "val"])
def test_what_was_trained_is_saved_when_the_text_turns_out_damaged(side, of_tokens, tmp_path, capfd, monkeypatch):
    # As if the file had been overwritten after it was checked.
    monkeypatch.setattr(NanogptTokens, "check", lambda self, report: None)
    monkeypatch.setattr(corpora, "find_leak", lambda *_: Leak(0, 0))
    tokens = np.random.default_rng(0).integers(0, 257, 16 * 16 * 12 + 1).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    tokens[-20] = 60000  # in the last window, which comes at some step of the first epoch
    tokens.tofile(tmp_path / f"{side}.bin")
    assert main([*of_tokens, "--trainer.evaluation_windows", "20" if side == "train" else "null"]) == 2
    assert "token id 60000" in capfd.readouterr().err
    done, saved = len(metrics(tmp_path / "run")), checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert saved[-1] == done and 0 < done < 12
    if side == "val":
        assert saved == [6]


@pytest.mark.slow
def test_a_token_file_that_is_cut_short_ends_the_run_in_one_line(of_tokens, tmp_path, after_step, capfd):
    after_step(1, lambda: os.truncate(tmp_path / "train.bin", 3000))
    assert main(of_tokens) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: data.train: {tmp_path}/train.bin ")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_a_step_on_an_overwritten_token_file_is_not_saved(of_tokens, tmp_path, after_step, capfd):
    after_step(7, lambda: shutil.copyfile(tmp_path / "other.bin", tmp_path / "train.bin"))
    assert main(of_tokens) == 2
    assert f"error: data.train: {tmp_path}/train.bin changed after it was opened" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6]
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "the training text has changed since the run began" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6]


@pytest.mark.slow
def test_checkpoints_that_know_less_of_the_text_are_gone_on_from(of_tokens, tmp_path, monkeypatch):
    facts = NanogptTokens.facts.func

    def before(self):
        return {name: value for name, value in facts(self).items() if name != "digest"}

    same_rate = ["--optimizer.schedule", "constant"]
    with monkeypatch.context() as patch:
        patch.setattr(NanogptTokens, "facts", property(before))
        assert main([*of_tokens, *same_rate, "--trainer.num_train_steps", "6"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--trainer.num_train_steps", "7"]) == 0


@pytest.mark.parametrize(("large", "side"), [(True, "train"), (False, "validation")])
def test_a_shard_of_another_text_is_not_trained_on(
    large, side, finished_run, config_file, text_file, tmp_path, monkeypatch, capfd
):
    if large:
        monkeypatch.setattr(token_store, "IN_MEMORY_BYTES", 0)
    run_dir, cache = finished_run.copy(tmp_path / "run", steps=[6]), tmp_path / "copied"
    shutil.copytree(finished_run.cache, cache)
    text_file.write_text(text_file.read_text().replace("says", "SAYS"))
    prepare(load_config(config_file).data, print)
    (shard,) = cache.glob(f"*/{side}/tokens/c/0")
    (foreign,) = (tmp_path / "cache").glob(f"*/{side}/tokens/c/0")
    assert shard.stat().st_size == foreign.stat().st_size
    shutil.copyfile(foreign, shard)
    capfd.readouterr()
    stores = [
        word for name in ("train", "validation") for word in (f"--data.{name}", f"store:{shard.parents[3]}/{name}")
    ]
    assert main(["--resume", str(run_dir), *stores, "--data.cache_dir", str(cache)]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"{shard.parents[2]}: the token store is damaged (the tokens have changed since they were written)" in error
    assert checkpoint.steps(run_dir / "checkpoints") == [6]


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_run_that_is_stopped_saves_before_its_text_has_been_compared(
    of_tokens, tmp_path, monkeypatch, after_step, capfd, step
):
    """While it trains, and while it waits to save its sixth step."""
    comparing = threading.Event()
    monkeypatch.setattr(NanogptTokens, "check_whole", lambda self, cache_dir: comparing.wait(20))

    def stop() -> None:
        threading.Timer(1.5 if step == 5 else 0, os.kill, [os.getpid(), signal.SIGTERM]).start()
        if step == 2:
            time.sleep(0.3)

    after_step(step, stop)
    assert main([*of_tokens, "--trainer.evaluate_every", "40"]) == 75
    comparing.set()
    last = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert step < last < 12
    assert checkpoint.read_step(tmp_path / "run" / "checkpoints", last).metadata["verified"] is False
    line = f"step {last} was saved before the text was verified"
    assert line in capfd.readouterr().out


@pytest.mark.slow
def test_a_cache_that_is_removed_ends_a_run_on_a_large_store_and_what_was_trained_is_saved(
    config_file, tmp_path, monkeypatch, after_step, capfd
):
    for name in ("IN_MEMORY_BYTES", "CACHE_BYTES"):
        monkeypatch.setattr(token_store, name, 0)
    after_step(7, lambda: shutil.rmtree(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    options = ["--trainer.num_train_steps", "30", "--trainer.evaluate_every", "30"]
    assert main(["--config", str(config_file), *options, "--trainer.run_dir", str(run_dir)]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path}/cache/") and "the token store is damaged" in error
    done = len(metrics(run_dir))
    assert 8 <= done < 30
    assert checkpoint.steps(run_dir / "checkpoints") == [6, done]


def test_a_text_has_all_that_was_saved_of_it():
    part = {"tokens": 5, "digest": "abc"}
    for saved, now, same in (
        (part, part | {"documents": 3}, True),  # which an earlier version did not save
        (part | {"documents": 3}, part, False),
        (part, part | {"digest": "abd"}, False),
        ({"mixture": [part]}, {"mixture": [part | {"documents": 3}]}, True),
        ({"mixture": [part]}, {"mixture": [part, part]}, False),
        ({"mixture": [part, part]}, {"mixture": [part]}, False),
        ({"mixture": [part]}, part, False),
    ):
        assert _is_same_text(saved, now) is same
