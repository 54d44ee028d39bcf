"""Checkpoints of nanoGPT and of the Sophia authors become the model that they are of; all else is one line."""

import builtins
import dataclasses

import numpy as np
import pytest
from weight_files import VOCAB, assert_same, nanogpt_args, read, refused

from sophia_levanter.interop.state_dict import gpt2_to_state_dict


@pytest.fixture
def save_checkpoint(tmp_path):
    """Writes what nanoGPT does: all of it in one dict, names as torch.compile and data-parallel training leave them."""
    torch = pytest.importorskip("torch")

    def save(model, prefix="", dtype="float32", **changes):
        tensors = {
            prefix + name: torch.from_numpy(np.array(array, order="C")).to(getattr(torch, dtype))
            for name, array in gpt2_to_state_dict(model, layout="linear").items()
        }
        tensors[f"{prefix}lm_head.weight"] = tensors[f"{prefix}transformer.wte.weight"]
        tensors[f"{prefix}transformer.h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8))
        whole = {
            "model": tensors,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
            "model_args": nanogpt_args(model.config),
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.0),
            "config": {"out_dir": "out"},
        }
        file = tmp_path / "ckpt.pt"
        torch.save(whole | changes, file)
        return file

    return save


@pytest.mark.parametrize(("use_bias", "prefix"), [(True, ""), (False, "_orig_mod."), (True, "module._orig_mod.")])
def test_a_checkpoint_of_nanogpt(use_bias, prefix, make_model, save_checkpoint):
    model = make_model(VOCAB, use_bias=use_bias)
    assert_same(read(save_checkpoint(model, prefix), model.config), model)


@pytest.mark.parametrize(("saved", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float32")])
def test_dtypes_of_checkpoints(saved, dtype, model, save_checkpoint):
    found = gpt2_to_state_dict(read(save_checkpoint(model, dtype=saved), model.config, dtype))
    for name, array in gpt2_to_state_dict(model).items():
        np.testing.assert_array_equal(found[name], array.astype(saved).astype(dtype), err_msg=name)


def test_the_sophia_authors_scaled_attention(make_model, save_checkpoint):
    model = make_model(VOCAB, scale_attn_by_inverse_layer_idx=True)
    file = save_checkpoint(model, model_args=nanogpt_args(model.config, scale_attn_by_inverse_layer_idx=True))
    assert_same(read(file, model.config), model)
    plain = dataclasses.replace(model.config, scale_attn_by_inverse_layer_idx=False)
    assert refused(file, plain).endswith("; set --model.scale_attn_by_inverse_layer_idx true")


def test_a_checkpoint_of_another_model(make_model, save_checkpoint):
    model = make_model(VOCAB)
    file = save_checkpoint(model, model_args=nanogpt_args(model.config, bias=True))
    assert refused(file, model.config).endswith("; set --model.use_bias true")
    with_bias = dataclasses.replace(model.config, use_bias=True)
    assert "h.0.ln_1.bias, h.1.ln_1.bias, " in refused(file, with_bias)
    assert refused(save_checkpoint(model), with_bias).endswith("; set --model.use_bias false")
    file = save_checkpoint(model, model_args=nanogpt_args(model.config, use_relu=True))
    assert "model_args contains use_relu=True, which this model does not support" in refused(file, model.config)
    file = save_checkpoint(model, model_args=nanogpt_args(model.config, use_relu=False))
    assert_same(read(file, model.config), model)
    epsilon = dataclasses.replace(model.config, layer_norm_epsilon=1e-6)
    assert refused(file, epsilon).endswith("; set --model.layer_norm_epsilon 1e-05")
    file = save_checkpoint(model, model_args={"n_layer": 2})
    assert "vocab_size is None; it must be a positive integer" in refused(file, model.config)


class Malicious:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return print, ("this was run",)


def test_no_checkpoint(model, save_checkpoint, tmp_path, capsys):
    import torch

    file = tmp_path / "other.pt"
    for other in ({"model": {}}, [1], {"model": 1, "model_args": {}}, torch.zeros(3)):
        torch.save(other, file)
        assert "not a checkpoint from nanoGPT or the Sophia authors" in refused(file, model.config)
    torch.save({"model": {"wte.weight": 3}, "model_args": nanogpt_args(model.config)}, file)
    assert "model contains 'wte.weight', which is not a named tensor" in refused(file, model.config)
    torch.save({"model": {"x": torch.ones(3, dtype=torch.int64)}, "model_args": nanogpt_args(model.config)}, file)
    assert "x is torch.int64; it must be floating-point" in refused(file, model.config)
    for content in (b"", b"no checkpoint", save_checkpoint(model).read_bytes()[:2000]):
        file.write_bytes(content)
        assert "torch cannot load it: " in refused(file, model.config)
    torch.save({"model": Malicious(), "model_args": {}}, file)
    assert "contains more than tensors and plain values, and pickled code is never run" in refused(file, model.config)
    assert "this was run" not in capsys.readouterr().out


def changed(file, **tensors):
    """A checkpoint with other tensors, or without those that are None."""
    import torch

    whole = torch.load(file)
    whole["model"] = {name: x for name, x in (whole["model"] | tensors).items() if x is not None}
    torch.save(whole, file)
    return file


def test_a_checkpoint_of_more_layers_than_it_has(model, save_checkpoint):
    file = save_checkpoint(model, model_args=nanogpt_args(model.config, n_layer=1_000_000))
    assert "model_args does not match the weights: n_layer is 1000000, but the weights have 2" in refused(
        file, model.config
    )


@pytest.mark.parametrize("kind", ["meta", "sparse_coo", "stride 0", "overlapping"])
def test_tensors_whose_numbers_are_not_all_in_the_file(kind, model, save_checkpoint):
    import torch

    dense = torch.ones(VOCAB, 8)
    tensor, wanted = {
        "meta": (torch.empty(VOCAB, 8, device="meta"), "is a meta tensor"),
        "sparse_coo": (dense.to_sparse(), "is a torch.sparse_coo tensor; save it as a dense tensor"),
        "stride 0": (torch.ones(1).expand(VOCAB, 10**9), "has shape (128, 1000000000) but stores fewer values"),
        "overlapping": (torch.ones(300).as_strided((VOCAB, 100), (1, 1)), "has shape (128, 100) but stores fewer"),
    }[kind]
    file = changed(save_checkpoint(model), **{"transformer.wte.weight": tensor})
    assert f"{file}: transformer.wte.weight {wanted}" in refused(file, model.config)


def test_names_in_a_checkpoint_cannot_write_to_the_terminal(model, save_checkpoint):
    import torch

    for name in ("\x1b[2J", "x" * 5000):
        message = refused(changed(save_checkpoint(model), **{name: torch.ones(2)}), model.config)
        assert message.isprintable() and len(message) < 500
    file = save_checkpoint(model, model_args=nanogpt_args(model.config) | {"\x1b[2J": "\x1b[2J" * 999})
    assert refused(file, model.config).isprintable() and len(refused(file, model.config)) < 500


def test_without_torch_one_line_says_so(model, tmp_path, monkeypatch):
    file = tmp_path / "ckpt.pt"
    file.write_bytes(b"cbuiltins\nprint\n(S'this was run'\ntR.")
    real = builtins.__import__

    def without_torch(name, *arguments, **options):
        if name.partition(".")[0] == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    message = refused(file, model.config)
    assert (
        "ckpt.pt: requires torch, which cannot be imported (No module named 'torch'); run pip install torch" in message
    )
    assert message.endswith("pickled code in the file is never run)")
