"""Exported models in the real transformers, and models of transformers here. Needs torch and transformers."""

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.config.model import LlamaConfig
from sophia_levanter.data.bpe import save_bpe, train_bpe
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.errors import InputError
from sophia_levanter.interop.exporting import export_model
from sophia_levanter.interop.state_dict import gpt2_to_state_dict, to_state_dict
from sophia_levanter.run.loading import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "I don't, WE'LL; 1234567 — naïve €5, 中文 🐍\n\n  the other anthem\t \r\n end "


@pytest.fixture
def words(tmp_path):
    """A byte-pair encoding of its own, by file."""
    file = tmp_path / "words.tiktoken"
    save_bpe(file, train_bpe([TEXT * 9], 290))
    return str(file)


def our_logits(model, ids):
    with jax.default_matmul_precision("float32"):
        logits = model(hax.named(jnp.asarray(ids, jnp.int32), ("batch", "position")))
    return np.asarray(logits.rearrange(("batch", "position", "vocab")).array)


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def random_ids(vocab_size, seq_len):
    return np.random.default_rng(0).integers(0, vocab_size, (2, seq_len))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_logits_are_the_same(use_bias, scaled, make_loaded, tmp_path):
    loaded = make_loaded(
        use_bias=use_bias,
        scale_attn_by_inverse_layer_idx=scaled,
        num_layers=3,
        mlp_ratio=3,
        layer_norm_epsilon=1e-3,
        dropout=0.5,
    )
    export_model(loaded, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    ids = random_ids(257, 32)
    wanted = our_logits(loaded.model, ids)
    assert wanted.std() > 0.4
    np.testing.assert_allclose(their_logits(theirs, ids), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_the_files(dtype, make_loaded, tmp_path):
    export_model(make_loaded(), tmp_path / "out", dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "own"])
def test_ids_and_generated_tokens(name, words, make_loaded, tmp_path):
    try:
        loaded = make_loaded(words if name == "own" else name)
    except InputError:
        pytest.skip("tiktoken's gpt2 is neither cached nor downloadable")
    export_model(loaded, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == loaded.tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == loaded.tokenizer.end_of_text
    plain = tokenizer("a<|endoftext|>", split_special_tokens=True)["input_ids"]
    assert plain == loaded.tokenizer.encode("a<|endoftext|>").tolist()
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == loaded.tokenizer.end_of_text
    assert tokenizer.model_max_length == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer("the", return_tensors="pt")
    found = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1)[0].tolist()
    wanted = prompt["input_ids"][0].tolist()
    for _ in range(6):
        wanted.append(int(our_logits(loaded.model, [wanted])[0, -1].argmax()))
    assert found == wanted


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_gpt2s_own_tokenizer_class_reads_the_files_too(tokenizer_class, words, make_loaded, tmp_path):
    export_model(make_loaded(words), tmp_path / "out")
    tokenizer = getattr(transformers, tokenizer_class).from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == load_tokenizer(words).encode(TEXT).tolist()


def test_what_transformers_saves_comes_back(words, make_loaded, tmp_path):
    loaded = make_loaded(words)
    export_model(loaded, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    (tmp_path / "out/tokenizer.tiktoken").rename(tmp_path / "again/tokenizer.tiktoken")
    back = load_model(str(tmp_path / "again"), report=print)
    assert back.config.model.use_bias is False
    assert back.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    found = gpt2_to_state_dict(back.model)
    for name, array in gpt2_to_state_dict(loaded.model).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpt2_of_transformers(dtype, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=24, n_embd=16, n_layer=2, n_head=2, n_inner=48, initializer_range=0.5
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "gpt2")
    loaded = load_model(str(tmp_path / "gpt2"), overrides=[("data.tokenizer", "bytes")], report=print)
    ids = random_ids(257, 24)
    wanted = their_logits(theirs.float(), ids)
    assert wanted.std() > 1
    np.testing.assert_allclose(our_logits(loaded.model, ids), wanted, rtol=0, atol=1e-4)


LLAMAS = {
    "Llama": {},
    "tied Llama": {"tie_embeddings": True, "num_kv_heads": 1, "rope_theta": 500.0},
    "Qwen3": {"qk_norm": True, "head_size": 12, "num_kv_heads": 1},
}


@pytest.mark.parametrize("kind", LLAMAS)
def test_a_llama_of_ours_there_and_back(kind, make_loaded, tmp_path):
    loaded = make_loaded(config_class=LlamaConfig, intermediate_dim=24, layer_norm_epsilon=1e-3, **LLAMAS[kind])
    export_model(loaded, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == f"{kind.split()[-1]}ForCausalLM"
    ids = random_ids(257, 32)
    wanted = our_logits(loaded.model, ids)
    assert wanted.std() > 0.2
    np.testing.assert_allclose(their_logits(theirs, ids), wanted, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    back = load_model(str(tmp_path / "again"), overrides=[("data.tokenizer", "bytes")], report=print)
    found = to_state_dict(back.model)
    for name, array in to_state_dict(loaded.model).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert tokens == loaded.tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_llama_of_transformers(kind, tmp_path):
    """What config.json leaves out has the same default in both, but for sizes that would not fit in memory here."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=257, hidden_size=64, intermediate_size=48, num_hidden_layers=2, initializer_range=0.3
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    overrides = [("data.tokenizer", "bytes"), ("model.seq_len", "32")]
    loaded = load_model(str(tmp_path / "theirs"), overrides=overrides, report=print)
    ids = random_ids(257, 32)
    wanted = their_logits(theirs, ids)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(our_logits(loaded.model, ids), wanted, rtol=0, atol=1e-4)
