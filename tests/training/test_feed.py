from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.data.encoding import encode
from sophia_levanter.data.store_writer import TokenStoreWriter
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.loop import BatchLoader

STEPS = 1000


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    text = "".join(map(chr, np.random.default_rng(0).integers(33, 127, 20_000)))
    writer = TokenStoreWriter(tmp_path / "store", ByteTokenizer(), "test")
    writer.append(encode(ByteTokenizer(), ([text], []))[0])
    writer.finish()
    return TokenStore.open(tmp_path / "store")


def loader(store: TokenStore, config: MeshConfig | None = None) -> BatchLoader:
    batches = TrainBatches(store, seq_len=16, batch_size=16, seed=3)
    return BatchLoader(batches, partition_of(config), TrainerConfig(batch_size=16, microbatch_size=8))


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=4, model=2), MeshConfig(data=2, sequence=2, model=2)])
def test_batches_are_on_the_devices_in_their_order(store: TokenStore, config: MeshConfig) -> None:
    loading = loader(store, config)
    batches = list(loading.load_all(5, 25))
    assert len(batches) == 20
    for step, batch in enumerate(batches, start=5):
        windows = TrainBatches(store, seq_len=16, batch_size=16, seed=3)[step]
        assert batch.tokens.array.sharding.mesh.size == 8
        np.testing.assert_array_equal(batch.tokens.array.reshape(16, 16), windows[:, :-1])
        np.testing.assert_array_equal(batch.targets.array.reshape(16, 16), windows[:, 1:])
        np.testing.assert_array_equal(loading.load(step).tokens.array, batch.tokens.array)


def test_a_process_reads_its_rows_of_each_microbatch(store: TokenStore) -> None:
    own = [2, 3, 6]
    place = SimpleNamespace(rows_of_this_process=lambda rows: np.array(own), place=lambda batch: batch)
    batches = TrainBatches(store, seq_len=16, batch_size=16, seed=3)
    config, passed_over = TrainerConfig(batch_size=16, microbatch_size=8), 32
    loading = BatchLoader(batches, place, config, passed_over)  # type: ignore[arg-type]
    tokens = loading.load(5).tokens.array
    np.testing.assert_array_equal(tokens[:, own], batches[7][:, :-1].reshape(2, 8, 16)[:, own])
    assert not np.delete(tokens, own, axis=1).any()


def test_only_a_few_batches_are_loaded_ahead(store: TokenStore) -> None:
    read = []

    class Counted(TrainBatches):
        def rows(self, step: int, wanted: np.ndarray | None = None, *, skipped_windows: int = 0) -> np.ndarray:
            read.append(step)
            return super().rows(step, wanted, skipped_windows=skipped_windows)

    batches = Counted(store, seq_len=16, batch_size=16, seed=3)
    loading = BatchLoader(batches, partition_of(), TrainerConfig(batch_size=16))
    for done, _ in enumerate(loading.load_all(0, 100), start=1):
        assert len(read) <= done + 4


def test_a_damaged_store_ends_it_with_its_own_error(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophia_levanter.data.token_store.IN_MEMORY_BYTES", 0)
    (shard,) = (store.path / "tokens" / "c").iterdir()
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as info:
        for _ in loader(TokenStore.open(store.path)).load_all(0, 100):
            pass
    assert str(store.path) in str(info.value)


PROGRAM = """
import sys
import numpy as np
from sophia_levanter.data.batches import TrainBatches
from sophia_levanter.data.token_store import TokenStore
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.partition.processes import start_processes
from sophia_levanter.config.trainer import TrainerConfig
from sophia_levanter.training.loop import BatchLoader

store, out, steps, address, count, number = sys.argv[1:]
if int(count) > 1:
    start_processes(MeshConfig(coordinator=address, num_processes=int(count), process_id=int(number)))
read = 0
class Counted(TrainBatches):
    def rows(self, step, wanted, *, skipped_windows):
        global read
        read += len(wanted)
        windows = np.full((16, 17), -1, np.int32)  # what is not read must not get anywhere
        windows[wanted] = super().rows(step, wanted)[wanted]
        return windows

batches = Counted(TokenStore.open(store), seq_len=16, batch_size=16, seed=3)
trainer = TrainerConfig(batch_size=16, microbatch_size=8)
loading = BatchLoader(batches, partition_of(MeshConfig(fsdp="embed")), trainer)
found = np.full((int(steps), 2, 8, 16), -2, np.int32)
for step, batch in enumerate(loading.load_all(0, int(steps))):
    for shard in batch.tokens.array.addressable_shards:
        found[(step, *shard.index)] = shard.data
np.savez(out, found=found, read=read)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_order_is_the_same_on_any_number_of_processes(store: TokenStore, tmp_path: Path) -> None:
    expected = np.stack([TrainBatches(store, seq_len=16, batch_size=16, seed=3)[step] for step in range(STEPS)])
    for count in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={4 // count}")
        outs = [tmp_path / f"{count}-{number}.npz" for number in range(count)]
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    PROGRAM,
                    str(store.path),
                    str(out),
                    str(STEPS),
                    address,
                    str(count),
                    str(number),
                ],
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            )
            for number, out in enumerate(outs)
        ]
        assert [process.wait(timeout=300) for process in processes] == [0] * count
        results = [np.load(out) for out in outs]
        # Each process has read its own rows and no more.
        assert [int(result["read"]) for result in results] == [STEPS * 16 // count] * count
        merged = np.max([result["found"] for result in results], axis=0)
        np.testing.assert_array_equal(merged.reshape(STEPS, 16, 16), expected[..., :-1])
        for result in results:
            assert set(np.unique((result["found"] == -2).mean(axis=(1, 2, 3)))) == {1 - 1 / count}


def test_rows_of_one_process_are_all() -> None:
    assert partition_of(MeshConfig(data=4, model=2)).rows_of_this_process(8).tolist() == list(range(8))
    assert len(jax.devices()) == 8
