"""The settings of a model. Free of jax, so that a command line can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sophia_levanter.config.settings import Settings, setting
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from haliax import Axis

VOCAB_MULTIPLE = 128
LARGEST = 2**20  # of any size of a model


@dataclass(frozen=True)
class Gpt2Config(Settings):
    """A GPT-2 model (Radford et al. 2019); the vocabulary's size comes from the tokenizer.

    Raises:
        InputError: if a value is out of its bounds or the heads do not divide the width.
    """

    section: ClassVar[str] = "model"

    num_layers: int = setting(12, "transformer blocks", low=1, high=LARGEST)
    num_heads: int = setting(12, "attention heads; must divide embed_dim", low=1, high=LARGEST)
    embed_dim: int = setting(768, "width of the residual stream", low=1, high=LARGEST)
    seq_len: int = setting(1024, "tokens in a training sequence; the longest context", low=1, high=LARGEST)
    mlp_ratio: int = setting(4, "hidden width of the MLP over embed_dim", low=1, high=LARGEST)
    vocab_rows: int | None = setting(
        None, "rows of the token embedding, if more than the tokenizer's tokens; never predicted", low=1, high=LARGEST
    )
    use_bias: bool = setting(False, "biases in linear layers and layer norms")
    scale_attn_by_inverse_layer_idx: bool = setting(
        False, "divide attention scores by the layer's index + 1, counted from 0"
    )
    dropout: float = setting(
        0.0, "dropout rate on embeddings, attention weights and each block's two outputs", low=0, below=1
    )
    layer_norm_epsilon: float = setting(1e-5, "added to the variance in layer norms", above=0)
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", above=0)
    gradient_checkpointing: str = setting(
        "full",
        "what a block's backward pass recomputes: none, full, or all but dots; offload moves them to the host",
        choices=("none", "full", "dots", "offload"),
    )
    scan_unroll: int = setting(
        1, "layers in one step of the scan; more compile longer and run faster on CPUs", low=1, high=LARGEST
    )
    attention: str = setting(
        "auto",
        "blocked (CPUs), cudnn (GPUs), splash (TPUs), xla, or auto for the device's fastest",
        choices=("auto", "blocked", "xla", "cudnn", "splash"),
    )
    loss_block_size: int = setting(256, "positions whose logits exist at one time in the loss", low=1, high=LARGEST)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"model.num_heads {self.num_heads} does not divide model.embed_dim {self.embed_dim}; "
                f"{_nearest_divisor(self.embed_dim, self.num_heads)} would"
            )

    def embedding_rows(self, vocab_size: int) -> int:
        """Rows of the token embedding without padding, for a tokenizer of so many tokens."""
        return max(vocab_size, self.vocab_rows or 0)

    @property
    def Embed(self) -> Axis:
        return _axis("embed", self.embed_dim)

    @property
    def Heads(self) -> Axis:
        return _axis("heads", self.num_heads)

    @property
    def HeadSize(self) -> Axis:
        return _axis("head_size", self.embed_dim // self.num_heads)

    @property
    def Layers(self) -> Axis:
        return _axis("layers", self.num_layers)

    @property
    def Mlp(self) -> Axis:
        return _axis("mlp", self.embed_dim * self.mlp_ratio)

    @property
    def Pos(self) -> Axis:
        return _axis("position", self.seq_len)


def _axis(name: str, size: int) -> Axis:
    from haliax import Axis

    return Axis(name, size)


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


def pad_vocab(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 128, as matrix units like it."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
