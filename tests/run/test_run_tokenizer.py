"""A run has its own tokenizer with it: the original may go, and must not change."""

import shutil

import pytest

from fake_gcs import FakeGcs, serving
from sophia_levanter.commands import evaluate, export, sample
from sophia_levanter.config.data import DataConfig
from sophia_levanter.data.bpe import ranks_of, save_bpe
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.run.loading import keep_tokenizer, load_model, with_kept_tokenizer
from tiny_runs import metrics

BYTES = {bytes([byte]): byte for byte in range(256)}


def write_words(path, *words):
    """A tokenizer of the bytes and some words."""
    save_bpe(path, BYTES | {word: 256 + i for i, word in enumerate(words)})
    return path


@pytest.fixture
def words(tmp_path):
    return write_words(tmp_path / "my own" / "words.tiktoken", b"th", b"in")


@pytest.fixture
def trained(words, config_file, tmp_path):
    """The command line of a run of one step, and its directory."""
    command = ["--config", str(config_file), "--data.tokenizer", str(words), "--data.num_workers", "0"]
    command += ["--trainer.batch_size", "8", "--trainer.microbatch_size", "null", "--trainer.checkpoint_every", "1"]
    command += ["--optimizer.warmup", "0", "--trainer.evaluation_windows", "4"]
    command += ["--trainer.run_dir", str(tmp_path / "run"), "--resume", "auto"]
    assert main([*command, "--trainer.num_train_steps", "1"]) == 0
    return command, tmp_path / "run"


@pytest.mark.slow
def test_a_moved_run_needs_no_other_tokenizer(trained, words, tmp_path, capfd):
    command, run_dir = trained
    fingerprint = load_tokenizer(str(words)).fingerprint
    moved = tmp_path / "a b" / "moved"
    moved.parent.mkdir()
    shutil.copytree(run_dir, moved)
    shutil.rmtree(words.parent)
    for place in (moved, moved / "checkpoints"):
        assert load_model(str(place), report=print).tokenizer.fingerprint == fingerprint
    assert sample.main([str(moved), "--prompt", "that", "--tokens", "2"]) == 0
    assert evaluate.main([str(moved), "--windows", "2"]) == 0
    assert export.main([str(moved), str(tmp_path / "out")]) == 0
    assert load_model(str(tmp_path / "out"), report=print).tokenizer.fingerprint == fingerprint
    assert main(["--resume", str(moved), "--trainer.num_train_steps", "2"]) == 0
    assert main([*command, "--trainer.num_train_steps", "2"]) == 0
    assert metrics(run_dir) == metrics(moved) and len(metrics(moved)) > 1
    capfd.readouterr()

    # One that has changed is not taken, and the copy is still that of the run.
    write_words(words, b"th", b"an")
    assert main([*command, "--trainer.num_train_steps", "3"]) == 2
    error = capfd.readouterr().err
    assert f"data.tokenizer {words} differs from the one that the run began with, saved as {run_dir}/" in error
    assert error.count("\n") == 1
    assert load_model(str(run_dir), report=print).tokenizer.fingerprint == fingerprint
    with pytest.raises(InputError, match=r"words\.tiktoken differs from the one that"):
        load_model(str(run_dir), overrides=[("data.tokenizer", str(words))], report=print)

    # Runs of earlier versions have no copy.
    (run_dir / "checkpoints/tokenizer.tiktoken").unlink()
    with pytest.raises(InputError, match=r"words\.tiktoken differs from the one that"):
        load_model(str(run_dir), report=print)
    write_words(words, b"th", b"in")
    assert load_model(str(run_dir), report=print).tokenizer.fingerprint == fingerprint


@pytest.mark.parametrize("url", ["gs://bucket/run/checkpoints", "gs://bucket/with space", None])
def test_a_copy_beside_checkpoints(url, words, tmp_path, monkeypatch):
    tokenizer, place = load_tokenizer(str(words)), url or tmp_path / "new" / "checkpoints"
    data = DataConfig(tokenizer=str(words))
    with serving(FakeGcs()) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        assert with_kept_tokenizer(data, place, resuming=True) == data
        # An attempt that saved nothing left another one.
        write_words(words, b"an", b"th")
        keep_tokenizer(place, load_tokenizer(str(words)), is_saved=False)
        write_words(words, b"th", b"in")
        keep_tokenizer(place, tokenizer, is_saved=False)
        kept = with_kept_tokenizer(data, place, resuming=True).tokenizer
        assert kept != str(words) and load_tokenizer(kept).fingerprint == tokenizer.fingerprint
        write_words(words, b"th")
        keep_tokenizer(place, load_tokenizer(str(words)), is_saved=True)
        with pytest.raises(InputError, match=r"words\.tiktoken differs from the one that the run began with"):
            with_kept_tokenizer(data, place, resuming=True)
        words.unlink()
        for resuming in (True, False):
            kept = with_kept_tokenizer(data, place, resuming=resuming).tokenizer
            assert ranks_of(load_tokenizer(kept)) == ranks_of(tokenizer)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_tokenizers_with_a_name_are_not_copied(name, tmp_path):
    keep_tokenizer(tmp_path / "checkpoints", load_tokenizer("bytes"), is_saved=False)
    assert not (tmp_path / "checkpoints").exists()
    data = DataConfig(tokenizer=name)
    assert with_kept_tokenizer(data, tmp_path, resuming=True) is data


def test_a_place_that_cannot_be_written(words, monkeypatch, tmp_path):
    tokenizer = load_tokenizer(str(words))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/checkpoints/tokenizer\.tiktoken cannot be used: "):
        keep_tokenizer(tmp_path / "file" / "checkpoints", tokenizer, is_saved=False)
    with serving(FakeGcs(refused="tokenizer")) as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.address)
        with pytest.raises(InputError, match=r"gs://bucket/run/tokenizer\.tiktoken cannot be used: .*quota") as error:
            keep_tokenizer("gs://bucket/run", tokenizer, is_saved=False)
    assert "\n" not in str(error.value)
