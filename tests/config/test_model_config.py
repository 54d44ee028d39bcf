from dataclasses import replace

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.model import Gpt2Config, pad_vocab
from sophia_levanter.config.run import check_parameters
from sophia_levanter.errors import InputError
from sophia_levanter.models.attention import Requirements, attention_for


@pytest.mark.parametrize(("vocab", "padded"), [(1, 128), (128, 128), (129, 256), (257, 384), (50257, 50304)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab, padded):
    assert pad_vocab(vocab) == padded


def test_rows_of_the_embedding():
    assert Gpt2Config().embedding_rows(50257) == 50257
    assert Gpt2Config(vocab_rows=50258).embedding_rows(50257) == 50258
    assert Gpt2Config(vocab_rows=257).embedding_rows(257) == 257
    with pytest.raises(InputError, match=r"^model\.vocab_rows is 0; it must be between 1 and 1048576$"):
        Gpt2Config(vocab_rows=0)
    config = TrainConfig(model=Gpt2Config(vocab_rows=256))
    with pytest.raises(
        InputError, match=r"^model\.vocab_rows 256 is less than the 257 tokens in data\.tokenizer bytes; "
    ):
        check_parameters(config, 1, 257)
    check_parameters(config, 1, 256)


CPU, GPU, TPU = (Requirements(platform, "bfloat16", 1024, 64) for platform in ("cpu", "gpu", "tpu"))


@pytest.mark.parametrize(
    ("required", "chosen"),
    [
        (CPU, "blocked"),
        (replace(CPU, dtype="float32", positions=1000, head_size=60), "blocked"),
        (replace(CPU, split_positions=True), "xla"),
        (replace(CPU, platform="METAL"), "xla"),
        (GPU, "cudnn"),
        (replace(GPU, dtype="float32"), "xla"),
        (replace(GPU, head_size=60), "xla"),
        (replace(GPU, head_size=256), "xla"),
        (replace(GPU, documents=True), "xla"),
        (TPU, "splash"),
        (replace(TPU, dtype="float32"), "splash"),
        (replace(TPU, positions=1000), "xla"),
        (replace(TPU, split_positions=True), "xla"),
        (replace(TPU, dropout=True), "xla"),
        (replace(TPU, documents=True), "splash"),
        (replace(CPU, documents=True), "blocked"),
    ],
    ids=str,
)
def test_attention_that_suits(required, chosen):
    assert attention_for("auto", required) == chosen
    assert attention_for("xla", required) == "xla"
    assert attention_for(chosen, required) == chosen


@pytest.mark.parametrize(
    ("wanted", "required", "reason"),
    [
        ("cudnn", CPU, "requires a GPU, but this device is a CPU"),
        ("splash", GPU, "requires a TPU, but this device is a GPU"),
        ("cudnn", replace(GPU, dtype="float32"), "requires trainer.compute_dtype bfloat16, not float32"),
        ("cudnn", replace(GPU, head_size=60), "requires a head size that is a multiple of 8 and at most 128, not 60"),
        ("splash", replace(TPU, positions=1000), "requires a multiple of 128 positions, not 1000"),
        ("blocked", replace(CPU, split_positions=True), "cannot split positions over devices (mesh.sequence)"),
        ("splash", replace(TPU, split_positions=True), "cannot split positions over devices (mesh.sequence)"),
        ("cudnn", replace(GPU, dropout=True), "does not support dropout (model.dropout)"),
        ("cudnn", replace(GPU, documents=True), "does not support document masking (data.mask_documents)"),
    ],
    ids=str,
)
def test_attention_that_cannot_be_had(wanted, required, reason):
    with pytest.raises(InputError) as error:
        attention_for(wanted, required)
    assert str(error.value) == f"model.attention is {wanted!r}, which {reason}; use auto or xla"
