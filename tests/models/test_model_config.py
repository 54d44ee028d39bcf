import pytest

from sophia_levanter.models.config import Gpt2Config, pad_vocab


@pytest.mark.parametrize(("vocab", "padded"), [(1, 128), (128, 128), (129, 256), (257, 384), (50257, 50304)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab, padded):
    assert pad_vocab(vocab) == padded


def test_axes():
    config = Gpt2Config(num_layers=3, num_heads=4, embed_dim=32, seq_len=16, mlp_ratio=2)
    axes = [config.Embed, config.Heads, config.HeadSize, config.Layers, config.Mlp, config.Pos]
    assert {axis.name: axis.size for axis in axes} == {
        "embed": 32,
        "heads": 4,
        "head_size": 8,
        "layers": 3,
        "mlp": 64,
        "position": 16,
    }
