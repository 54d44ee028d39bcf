"""Whether pretrained weights and the tokenizer have the same vocabulary, and rows of the embedding beyond it."""

import dataclasses
import json

import haliax as hax
import jax
import numpy as np
import pytest
from weight_files import VOCAB, assert_same, read, refused, save_folder

from sophia_levanter.data.bpe import bytes_of_characters
from sophia_levanter.data.tokenizer import ByteTokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.interop.pretrained import check_vocabulary
from sophia_levanter.interop.saved_weights import open_model
from sophia_levanter.interop.state_dict import gpt2_to_state_dict


def test_an_export_tells_its_tokenizer(folder, model, arrays):
    own = {"tokenizer": "bytes", "tokenizer_fingerprint": "of bytes"}
    save_folder(folder, model.config, arrays, sophia_levanter=own)
    assert open_model(folder).tokenizer == "bytes"
    assert (
        f"data.tokenizer words differs from the one that {folder} was trained with; set --data.tokenizer bytes"
        in refused(folder, model.config)
    )
    read(folder, model.config, fingerprint="of bytes")
    save_folder(folder, model.config, arrays, sophia_levanter={"tokenizer": "tokenizer.tiktoken"})
    assert open_model(folder).tokenizer == str(folder / "tokenizer.tiktoken")
    read(folder, model.config)


def test_a_padded_vocabulary_loses_its_padding(make_model, tmp_path):
    model = make_model(VOCAB, use_bias=True)
    folder = save_folder(tmp_path / "gpt2", model.config, gpt2_to_state_dict(model))
    lines = []
    found = read(folder, model.config, vocab_size=100, lines=lines)
    assert found.vocab_size == 100
    wte = np.asarray(model.wte.weight.array)
    np.testing.assert_array_equal(found.wte.weight.array, np.where(np.arange(128)[:, None] < 100, wte, 0))
    assert lines == [
        "the embedding has 128 rows: 100 for the tokens of data.tokenizer words and padding, which is dropped"
    ]
    assert f"data.tokenizer words has 129 tokens, but {folder} has 128 embedding rows, 1 fewer; set --data" in refused(
        folder, model.config, vocab_size=129
    )


def test_rows_beyond_the_tokenizers_are_kept_and_never_predicted(make_model, tmp_path):
    """Added tokens, or rows padded to another multiple than ours."""
    rows = 200
    model = make_model(rows, use_bias=True)
    arrays = gpt2_to_state_dict(model)
    folder = save_folder(tmp_path / "gpt2", model.config, arrays, vocab_size=rows)
    lines = []
    found = read(folder, model.config, lines=lines)
    assert (found.vocab_size, found.config.vocab_rows) == (VOCAB, rows)
    assert lines == [
        f"the embedding has {rows} rows: 128 for the tokens of data.tokenizer words and {rows - 128} more, which are "
        "kept but never predicted"
    ]
    for name, array in gpt2_to_state_dict(found).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    tokens = hax.named(np.zeros(8, np.int32), "position")
    fewer = {"transformer.wte.weight": arrays["transformer.wte.weight"][:VOCAB]}
    plain = read(save_folder(tmp_path / "plain", model.config, arrays | fewer), model.config)
    logits = [jax.tree.map(jax.numpy.asarray, one)(tokens).array for one in (found, plain)]
    assert logits[0].shape == (8, VOCAB)
    np.testing.assert_array_equal(*logits)
    assert_same(read(folder, found.config), found)
    other = dataclasses.replace(model.config, vocab_rows=300)
    assert refused(folder, other).endswith(
        f"model.vocab_rows is 300, but {folder} has {rows}; set --model.vocab_rows {rows}"
    )


@pytest.mark.parametrize(
    ("rows", "tokens", "wanted"),
    [
        (300, 128, "set --data.tokenizer to the tokenizer of the model, or --model.vocab_rows 300 to keep 172 rows"),
        (50257, 257, "set --data.tokenizer gpt2, or --model.vocab_rows 50257"),
        (50304, 257, "set --data.tokenizer gpt2, or"),
        (50281, 50257, "set --data.tokenizer p50k_base, or"),
        (50257, 50281, "has 50281 tokens, but FOLDER has 50257 embedding rows, 24 fewer; set --data.tokenizer gpt2"),
    ],
)
def test_rows_that_may_be_another_tokenizers(rows, tokens, wanted, make_model, tmp_path):
    model = make_model(VOCAB, use_bias=True)
    arrays = gpt2_to_state_dict(model) | {"transformer.wte.weight": np.zeros((rows, 8), np.float16)}
    folder = save_folder(tmp_path / "gpt2", model.config, arrays, vocab_size=rows)
    assert wanted.replace("FOLDER", str(folder)) in refused(folder, model.config, vocab_size=tokens)
    if rows > tokens:
        said = dataclasses.replace(model.config, vocab_rows=rows)
        assert read(folder, said, vocab_size=tokens).config == said


def characters(token):
    """A token as vocab.json writes it."""
    byte_of = {byte: character for character, byte in bytes_of_characters().items()}
    return "".join(byte_of[byte] for byte in token)


@pytest.fixture
def vocab():
    """That of bytes, which is the tokenizer's, with an added token."""
    return {characters(bytes([byte])): byte for byte in range(256)} | {"<|endoftext|>": 256, "<pad>": 257}


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_folder_with_the_vocabulary_of_the_tokenizer(name, vocab, tmp_path):
    (tmp_path / name).write_text(json.dumps(vocab if name == "vocab.json" else {"model": {"vocab": vocab}}))
    check_vocabulary(str(tmp_path), ByteTokenizer())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            {"a": 98, "b": 97},
            "token 97 is 'b', but b'a' in data.tokenizer bytes; specify the tokenizer that the model was",
        ),
        ({"<s>": 0}, "token 0 is '<s>'"),
        ({"\N{GREEK SMALL LETTER ALPHA}": 255}, "token 255 is "),
        ({"\x1b[2J" * 99: 3}, r"…x1b[2J" + r"\x1b[2J" * 6 + "', but b'"),
        ({"a": "x"}, "contains no token-to-id mapping"),
    ],
)
def test_a_folder_with_the_vocabulary_of_another_tokenizer(change, wanted, vocab, tmp_path):
    vocab = {text: token for text, token in vocab.items() if token not in change.values()} | change
    for name, content in (("tokenizer.json", {"model": {"vocab": vocab}}), ("vocab.json", vocab)):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"{name}: ") as caught:
            check_vocabulary(str(tmp_path), ByteTokenizer())
        assert wanted in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_tokenizer_file_of_another_kind(tmp_path):
    for content, wanted in (
        ({"model": []}, "contains no token-to-id"),
        ({"model": {"vocab": [["a", -1]]}}, "contains no"),
        (3, "not a JSON object"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"tokenizer.json: {wanted}"):
            check_vocabulary(str(tmp_path), ByteTokenizer())
    check_vocabulary(str(tmp_path / "ckpt.pt"), ByteTokenizer())
