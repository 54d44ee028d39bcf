"""Each file in config/data, prepared from data of the schema that it is for: what needs the hub from local copies."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.data.corpora import prepare
from sophia_levanter.data.file_source import FileSource

CONFIGS = Path(__file__).parents[2] / "config" / "data"
TEXTS = [f"Document {i}. " + "It has several words. " * 8 for i in range(400)]


def dataset(folder: str, config: str, columns: dict[str, object], splits: tuple[str, ...] = ("train",)) -> None:
    """What `datasets` makes of a name before it asks the hub: a folder that is laid out as on the hub."""
    Path(folder, config).mkdir(parents=True)
    for split in splits:
        rows = TEXTS if split == "train" else [f"{split} only"] * 20
        Dataset.from_dict({"text": rows, **{k: [v] * len(rows) for k, v in columns.items()}}).to_parquet(
            f"{folder}/{config}/{split}-00000-of-00001.parquet"
        )
    files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
    card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
    Path(folder, "README.md").write_text(f"---\n{card}\n---\n")


def novels() -> None:
    for name, texts in (("train", TEXTS), ("validation", ["validation only"])):
        lines = "\n".join(json.dumps({"title": "A title", "text": text}) for text in texts)
        Path(f"novels-{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def bins() -> None:
    for name in ("train", "val"):
        np.random.default_rng(0).integers(0, 257, 5000).astype(np.uint16).tofile(f"{name}.bin")


def shards() -> None:
    """Token files with the header of llm.c: 256 int32 numbers."""
    Path("fineweb10B").mkdir()
    for name in ("train_000001", "val_000000"):
        tokens = np.random.default_rng(0).integers(0, 257, 5000).astype("<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        Path(f"fineweb10B/fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())


MAKE: dict[str, Callable[[], None]] = {
    "openwebtext": lambda: dataset("Skylion007/openwebtext", "plain_text", {}),
    "pile": lambda: dataset(
        "monology/pile-uncopyrighted",
        "default",
        {"meta": {"pile_set_name": "Pile-CC"}},
        ("train", "validation", "test"),
    ),
    "wikitext_103": lambda: dataset("Salesforce/wikitext", "wikitext-103-raw-v1", {}, ("train", "validation", "test")),
    "fineweb_edu": lambda: dataset(
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        {"id": "<urn>", "dump": "CC-MAIN-2013-20", "url": "http://", "token_count": 7, "score": 3.5, "int_score": 4},
    ),
    "novels": novels,
    "nanogpt_bins": bins,
    "fineweb_bins": shards,
    "python_stdlib": lambda: None,
}


def config_of(name: str, cache_dir: Path) -> TrainConfig:
    overrides = [("data.cache_dir", str(cache_dir)), ("data.tokenizer", "bytes"), ("data.num_workers", "0")]
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def test_every_file_is_tried() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_a_config_becomes_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MAKE[name]()
    config = config_of(name, tmp_path / "cache")
    if name == "python_stdlib":  # all of it takes a while
        documents = FileSource.documents
        monkeypatch.setattr(FileSource, "documents", lambda self, *start: islice(documents(self, *start), 50))
    data = prepare(config.data, print)
    if name in ("nanogpt_bins", "fineweb_bins", "python_stdlib"):
        assert name != "fineweb_bins" or data.train.num_tokens == 5000  # the header is none of them
        assert min(data.train.num_tokens, data.validation.num_tokens) > 1000
        return
    sides = [data.tokenizer.decode(corpus.read(0, corpus.num_tokens)) for corpus in (data.train, data.validation)]
    if config.data.validation is None:
        assert sorted("".join(sides)) == sorted("".join(TEXTS))
        assert sides[1]
    else:
        assert sides[0] == "".join(TEXTS)
        assert "validation only" in sides[1]
