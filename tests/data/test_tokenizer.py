from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from sophia_levanter.data.bpe import tokenizer_json
from sophia_levanter.data.encoding import encode_with
from sophia_levanter.data.tokenizer import (
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    token_byte_lengths,
)
from sophia_levanter.errors import InputError

MakeEncoding = Callable[..., tiktoken.Encoding]

TEXT = "the other anthem: naïve €5 — 🐍\r\n\x00 end"


@pytest.fixture(params=["bytes", "tiny"])
def tokenizer(request: pytest.FixtureRequest, tiny_bpe: Tokenizer) -> Tokenizer:
    return tiny_bpe if request.param == "tiny" else ByteTokenizer()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise requests.exceptions.ProxyError("http://user:secret@proxy")

    monkeypatch.setattr(requests, "get", refuse)


def test_bytes_are_the_utf8_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(TEXT.encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def test_decoding_gives_the_text_back_and_end_of_text_is_nothing(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode(TEXT).tolist(), tokenizer.end_of_text]
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.decode_bytes(np.array(tokens, np.uint16)) == TEXT.encode()
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("€")[:1]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 301])
def test_decoding_refuses_ids_that_are_not(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=str(token)):
        tokenizer.decode([65, token])


def test_tiktoken_merges(tiny_bpe: Tokenizer) -> None:
    assert tiny_bpe.encode("the an").tolist() == [257, 32, 258]
    assert (tiny_bpe.vocab_size, tiny_bpe.end_of_text) == (301, 300)


def test_special_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode(tokens) == "a<|endoftext|>b"


def test_lone_surrogates_do_not_break_encoding(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\udc80b"))[0::2] == "ab"


def test_the_fingerprint_tells_encodings_apart(tiny_encoding: MakeEncoding) -> None:
    same = TiktokenTokenizer(tiny_encoding()).fingerprint
    assert TiktokenTokenizer(tiny_encoding()).fingerprint == same
    others = {
        TiktokenTokenizer(tiny_encoding(merges=(b"th", b"an", b"the"))).fingerprint,
        TiktokenTokenizer(tiny_encoding(pattern=r"\w+|\W+")).fingerprint,
        ByteTokenizer().fingerprint,
    }
    assert len(others | {same}) == 4


def test_token_byte_lengths_count_text_only(tiny_bpe: Tokenizer) -> None:
    lengths = token_byte_lengths(tiny_bpe)
    assert lengths.shape == (301,)
    assert lengths[tiny_bpe.encode(TEXT)].sum() == len(TEXT.encode())
    assert lengths[257] == 3
    assert not lengths[259:].any()  # unused ids and end-of-text
    assert token_byte_lengths(ByteTokenizer()).tolist() == [1] * 256 + [0]


@pytest.mark.parametrize("name", ["out/tokenizer.json", "vocab.json", "my vocab/merges.txt", "spm.model", "a/b"])
def test_a_file_of_another_kind_is_named(name: str) -> None:
    message = f"data.tokenizer is {name!r}; a tokenizer file must be written by train_tokenizer and end in .tiktoken"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        load_tokenizer(name)


class Halves(Tokenizer):
    """`halves:SIZE`: the two halves of each byte."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 16, [*(b"%x" % half for half in range(16)), b""], special_tokens={}, pattern="")

    def encode(self, text: str) -> np.ndarray:
        return np.array([half for byte in text.encode() for half in divmod(byte, 16)], np.int32)


def test_a_tokenizer_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = Tokenizer.get_known_choices()
    monkeypatch.setitem(registered, "halves", Halves)
    tokenizer = load_tokenizer("halves:2")
    assert tokenizer.name == "halves:2" and tokenizer.decode(tokenizer.encode("no")) == "6e6f"
    # As a process that has not imported its module encodes.
    train, _ = encode_with(__name__, "halves:2", tokenizer.fingerprint, (["no"], []))
    assert train.tokens.tolist() == [6, 14, 6, 15, 16]
    with pytest.raises(
        InputError, match=r"^data\.tokenizer is 'halve'; did you mean halves\? Available tokenizers: bytes, halves"
    ):
        load_tokenizer("halve")
    with pytest.raises(InputError, match=r"^data\.tokenizer halves:2 is not a byte-pair encoding and cannot be exp"):
        tokenizer_json(tokenizer)
    monkeypatch.setitem(registered, "half", type("Half", (Tokenizer,), {}))
    with pytest.raises(InputError, match=r"^data\.tokenizer: Half does not define encode\(\)"):
        load_tokenizer("half")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"^data\.tokenizer is 'gpt-2'; did you mean gpt2\? .*bytes.*cl100k_base"
    ) as info:
        load_tokenizer("gpt-2")
    assert "\n" not in str(info.value)


def test_an_encoding_that_cannot_be_had(no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(InputError, match=r"^data\.tokenizer: gpt2 .*ProxyError.*TIKTOKEN_CACHE_DIR") as info:
        load_tokenizer("gpt2")
    assert "secret" not in str(info.value)


def test_an_encoding_without_end_of_text(tiny_encoding: MakeEncoding) -> None:
    encoding = tiny_encoding()
    encoding._special_tokens.clear()
    with pytest.raises(InputError, match="tiny has no"):
        TiktokenTokenizer(encoding)


def test_gpt2(no_network: None) -> None:
    try:
        tokenizer = load_tokenizer("gpt2")
    except InputError as error:
        pytest.skip(str(error))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_text_that_the_pattern_gives_up_on_is_encoded_in_pieces(tiny_encoding: MakeEncoding) -> None:
    tokenizer = TiktokenTokenizer(tiny_encoding(pattern=r50k_pat_str))
    text = "the end" + " " * 2_000_000 + "the an"
    assert tokenizer.decode(tokenizer.encode(text)) == text
