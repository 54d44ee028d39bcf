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


@pytest.mark.parametrize(
    ("platform", "dtype", "positions", "head_size", "split", "chosen"),
    [
        ("cpu", "bfloat16", 1024, 64, False, "blocked"),
        ("cpu", "float32", 1000, 60, False, "blocked"),
        ("cpu", "float32", 1024, 64, True, "xla"),
        ("METAL", "float32", 1024, 64, False, "xla"),
        ("gpu", "bfloat16", 1024, 64, False, "cudnn"),
        ("gpu", "float32", 1024, 64, False, "xla"),
        ("gpu", "bfloat16", 1024, 60, False, "xla"),
        ("gpu", "bfloat16", 1024, 256, False, "xla"),
        ("tpu", "bfloat16", 1024, 64, False, "splash"),
        ("tpu", "float32", 1024, 64, False, "splash"),
        ("tpu", "bfloat16", 1000, 64, False, "xla"),
        ("tpu", "bfloat16", 1024, 64, True, "xla"),
    ],
)
def test_attention_that_suits(platform, dtype, positions, head_size, split, chosen):
    required = Requirements(platform, dtype, positions, head_size, split)
    assert attention_for("auto", required) == chosen
    assert attention_for("xla", required) == "xla"
    if chosen != "xla":
        assert attention_for(chosen, required) == chosen


@pytest.mark.parametrize(
    ("wanted", "platform", "dtype", "positions", "head_size", "split", "reason"),
    [
        ("cudnn", "cpu", "bfloat16", 1024, 64, False, "requires a GPU, but this device is a CPU"),
        ("splash", "gpu", "bfloat16", 1024, 64, False, "requires a TPU, but this device is a GPU"),
        ("cudnn", "gpu", "float32", 1024, 64, False, "requires trainer.compute_dtype bfloat16, not float32"),
        (
            "cudnn",
            "gpu",
            "bfloat16",
            1024,
            60,
            False,
            "requires a head size that is a multiple of 8 and at most 128, not 60",
        ),
        (
            "splash",
            "tpu",
            "bfloat16",
            1000,
            64,
            False,
            "requires a number of positions that is a multiple of 128, not 1000",
        ),
        ("blocked", "cpu", "float32", 1024, 64, True, r"cannot split positions over devices \(mesh.sequence\)"),
        ("splash", "tpu", "bfloat16", 1024, 64, True, r"cannot split positions over devices \(mesh.sequence\)"),
    ],
)
def test_attention_that_cannot_be_had(wanted, platform, dtype, positions, head_size, split, reason):
    with pytest.raises(InputError, match=rf"^model.attention is '{wanted}', which {reason}; use auto or xla$"):
        attention_for(wanted, Requirements(platform, dtype, positions, head_size, split))


def test_kernels_have_no_dropout():
    assert attention_for("auto", Requirements("tpu", "bfloat16", 1024, 64, dropout=True)) == "xla"
    with pytest.raises(
        InputError, match=r"^model.attention is 'cudnn', which does not support dropout \(model.dropout\)"
    ):
        attention_for("cudnn", Requirements("gpu", "bfloat16", 1024, 64, dropout=True))


def test_cudnn_masks_no_documents():
    given = ("bfloat16", 1024, 64)
    assert attention_for("auto", Requirements("gpu", *given, documents=True)) == "xla"
    assert attention_for("auto", Requirements("tpu", *given, documents=True)) == "splash"
    assert attention_for("auto", Requirements("cpu", *given, documents=True)) == "blocked"
    with pytest.raises(
        InputError,
        match=r"^model.attention is 'cudnn', which does not support document masking \(data.mask_documents\);",
    ):
        attention_for("cudnn", Requirements("gpu", *given, documents=True))
