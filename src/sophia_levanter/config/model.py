"""The settings of models, and how they become models. Free of jax until one is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from draccus import ChoiceRegistry

from sophia_levanter.config.settings import Settings, not_defined, setting
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    import jax
    from haliax import Axis

    from sophia_levanter.models.language_model import LanguageModel

VOCAB_MULTIPLE = 128
LARGEST = 2**20  # of any size of a model


@dataclass(frozen=True)
class ModelConfig(Settings, ChoiceRegistry):
    """Settings of every model; the vocabulary's size comes from the tokenizer.

    Raises:
        InputError: if a value is out of its bounds.
    """

    section: ClassVar[str] = "model"
    title: ClassVar[str] = "model"  # what people call it

    seq_len: int = setting(1024, "tokens in a training sequence; the longest context", low=1, high=LARGEST)
    vocab_rows: int | None = setting(
        None, "rows of the token embedding, if more than the tokenizer's tokens; never predicted", low=1, high=LARGEST
    )
    loss_block_size: int = setting(
        256, "positions whose logits exist at one time in the loss", low=1, high=LARGEST, free=True
    )

    def build(self, *, vocab_size: int, key: jax.Array) -> LanguageModel:
        """A model with random weights.

        Args:
            vocab_size: classes that can be predicted.
            key: a jax random key.
        """
        raise not_defined(self, "build")

    def embedding_rows(self, vocab_size: int) -> int:
        """Rows of the token embedding without padding, for a tokenizer of so many tokens."""
        return max(vocab_size, self.vocab_rows or 0)

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        """What sets the size of each named axis of the parameters, for messages, and that size."""
        return {"position": ("model.seq_len", self.seq_len)}

    def describe(self) -> str:
        """Its sizes, for people."""
        return f"{self.seq_len} positions"

    def attention_on(self, platform: str, dtype: str, *, split_positions: bool) -> str | None:
        """The implementation of attention on a kind of device, in a dtype; None for a model without attention.

        Raises:
            InputError: if the requested implementation cannot be used.
        """
        return None

    @property
    def Pos(self) -> Axis:
        return _axis("position", self.seq_len)

    def Vocab(self, vocab_size: int) -> Axis:
        """The vocabulary with its padding."""
        return _axis("vocab", pad_vocab(self.embedding_rows(vocab_size)))


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Settings of every transformer.

    Raises:
        InputError: if a value is out of its bounds or the heads do not divide the width.
    """

    num_layers: int = setting(12, "transformer blocks", low=1, high=LARGEST)
    num_heads: int = setting(12, "attention heads; must divide embed_dim", low=1, high=LARGEST)
    embed_dim: int = setting(768, "width of the residual stream", low=1, high=LARGEST)
    dropout: float = setting(
        0.0, "dropout rate on embeddings, attention weights and each block's two outputs", low=0, below=1, free=True
    )
    layer_norm_epsilon: float = setting(1e-5, "added to the variance in norms", above=0)
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", above=0, free=True)
    gradient_checkpointing: str = setting(
        "full",
        "what a block's backward pass recomputes: none, full, or all but dots; offload moves them to the host",
        choices=("none", "full", "dots", "offload"),
        free=True,
    )
    scan_unroll: int = setting(
        1, "layers in one step of the scan; more compile longer and run faster on CPUs", low=1, high=LARGEST, free=True
    )
    attention: str = setting(
        "auto",
        "blocked (CPUs), cudnn (GPUs), splash (TPUs), xla, or auto for the device's fastest",
        choices=("auto", "blocked", "xla", "cudnn", "splash"),
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisor("model.num_heads", self.num_heads, "model.embed_dim", self.embed_dim)

    @property
    def mlp_dim(self) -> int:
        """The hidden width of the MLP."""
        raise not_defined(self, "mlp_dim")

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        return super().axis_sizes() | {
            "embed": ("model.embed_dim", self.embed_dim),
            "heads": ("model.num_heads", self.num_heads),
            "layers": ("model.num_layers", self.num_layers),
        }

    def describe(self) -> str:
        return f"{self.num_layers} layers, {self.num_heads} heads, {self.embed_dim} wide, {self.seq_len} positions"

    def attention_on(self, platform: str, dtype: str, *, split_positions: bool) -> str:
        from sophia_levanter.models.attention import attention_for

        return attention_for(
            self.attention,
            platform,
            dtype,
            self.seq_len,
            self.embed_dim // self.num_heads,
            split_positions=split_positions,
            dropout=self.dropout > 0,
        )

    @property
    def Embed(self) -> Axis:
        return _axis("embed", self.embed_dim)

    @property
    def Heads(self) -> Axis:
        return _axis("heads", self.num_heads)

    @property
    def KVHeads(self) -> Axis:
        """The heads of keys and values."""
        return self.Heads

    @property
    def HeadSize(self) -> Axis:
        return _axis("head_size", self.embed_dim // self.num_heads)

    @property
    def Layers(self) -> Axis:
        return _axis("layers", self.num_layers)

    @property
    def Mlp(self) -> Axis:
        return _axis("mlp", self.mlp_dim)


@ModelConfig.register_subclass("gpt2")
@dataclass(frozen=True)
class Gpt2Config(TransformerConfig):
    """GPT-2 (Radford et al. 2019)."""

    title: ClassVar[str] = "GPT-2"

    mlp_ratio: int = setting(4, "hidden width of the MLP over embed_dim", low=1, high=LARGEST)
    use_bias: bool = setting(False, "biases in linear layers and layer norms")
    scale_attn_by_inverse_layer_idx: bool = setting(
        False, "divide attention scores by the layer's index + 1, counted from 0"
    )

    def build(self, *, vocab_size: int, key: jax.Array) -> LanguageModel:
        from sophia_levanter.models.gpt2 import Gpt2

        return Gpt2.init(self, vocab_size=vocab_size, key=key)

    @property
    def mlp_dim(self) -> int:
        return self.embed_dim * self.mlp_ratio

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        return super().axis_sizes() | {"mlp": ("model.embed_dim x model.mlp_ratio", self.mlp_dim)}


def check_divisor(name: str, divisor: int, other: str, number: int) -> None:
    """Check that one setting divides another.

    Raises:
        InputError: names both and the nearest number that would.
    """
    if number % divisor:
        nearest = min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - divisor))
        raise InputError(f"{name} {divisor} does not divide {other} {number}; {nearest} would")


def pad_vocab(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 128, as matrix units like it."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _axis(name: str, size: int) -> Axis:
    from haliax import Axis

    return Axis(name, size)
