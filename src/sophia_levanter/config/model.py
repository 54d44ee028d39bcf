"""Model settings. jax is imported only when a model is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from draccus import ChoiceRegistry

from sophia_levanter.config.settings import Settings, not_defined, setting
from sophia_levanter.errors import InputError, counted

if TYPE_CHECKING:
    import jax
    from haliax import Axis

    from sophia_levanter.models.language_model import LanguageModel

VOCAB_MULTIPLE = 128
LARGEST = 2**20  # upper bound for size settings


class Growth(NamedTuple):
    """A model's width and depth relative to the base model, on which the hyper-parameters were tuned."""

    width: float = 1.0
    depth: float = 1.0


@dataclass(frozen=True)
class ModelConfig(Settings, ChoiceRegistry):
    """Settings shared by all models. The vocabulary size comes from the tokenizer."""

    section: ClassVar[str] = "model"
    title: ClassVar[str] = "model"  # the model's name in messages

    seq_len: int = setting(1024, "tokens per training sequence; also the maximum context length", low=1, high=LARGEST)
    vocab_rows: int | None = setting(
        None,
        "number of token embedding rows, if larger than the vocabulary; extra rows are never predicted",
        low=1,
        high=LARGEST,
    )
    loss_block_size: int = setting(
        256, "number of positions whose logits the loss computes at a time", low=1, high=LARGEST, free=True
    )

    def build(self, *, vocab_size: int, key: jax.Array) -> LanguageModel:
        """Build a model with random weights.

        Args:
            vocab_size: number of tokens that can be predicted.
            key: the JAX random key for the weights.
        """
        raise not_defined(self, "build")

    def explicit(self) -> ModelConfig:
        """Return these settings with all derived values filled in."""
        return self

    def embedding_rows(self, vocab_size: int) -> int:
        """Return the number of rows in the unpadded token embedding for a tokenizer with `vocab_size` tokens."""
        return max(vocab_size, self.vocab_rows or 0)

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        """Return (field, size) for each named parameter axis. The field is the setting to name in error messages."""
        return {"position": ("model.seq_len", self.seq_len)}

    def describe(self) -> str:
        """Describe the model's dimensions in words."""
        return counted(self.seq_len, "position")

    def attention_on(self, platform: str, dtype: str, *, split_positions: bool, documents: bool = False) -> str | None:
        """Return the attention implementation for a platform and dtype, or None for a model without attention.

        Raises:
            InputError: if the requested implementation cannot be used, or if `documents` is true but the model cannot
                mask documents.
        """
        if documents:
            raise InputError(
                f"data.mask_documents is true, but {self.title} cannot mask documents; "
                "set it to false or use a transformer"
            )
        return None

    @property
    def growth(self) -> Growth:
        """The model's width and depth relative to the base model."""
        return Growth()

    def forward_factors(self) -> dict[str, float]:
        """Return the factors that the parametrization applies in the forward pass, keyed by display name."""
        return {}

    @property
    def Pos(self) -> Axis:
        return _axis("position", self.seq_len)

    def Vocab(self, vocab_size: int) -> Axis:
        """Return the vocabulary axis, including padding."""
        return _axis("vocab", pad_vocab(self.embedding_rows(vocab_size)))


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Settings shared by all transformers.

    Raises:
        InputError: if a value is out of bounds or the number of heads does not divide the width.
    """

    is_family: ClassVar[bool] = True  # these settings are kept when the type changes to another transformer

    num_layers: int = setting(12, "number of transformer blocks", low=1, high=LARGEST)
    num_heads: int = setting(12, "number of attention heads; must divide embed_dim", low=1, high=LARGEST)
    embed_dim: int = setting(768, "width of the residual stream", low=1, high=LARGEST)
    dropout: float = setting(
        0.0, "dropout rate for embeddings, attention weights, and attention and MLP outputs", low=0, below=1, free=True
    )
    layer_norm_epsilon: float = setting(1e-5, "epsilon added to the variance in normalization layers", above=0)
    initializer_range: float = setting(0.02, "standard deviation of the initial weights", above=0, free=True)
    gradient_checkpointing: str = setting(
        "full",
        "activations recomputed in the backward pass; dots keeps matrix products, offload moves them to the host",
        choices=("none", "full", "dots", "offload"),
        free=True,
    )
    scan_unroll: int = setting(
        1, "layers per scan step; larger values slow compilation but run faster on CPUs", low=1, high=LARGEST, free=True
    )
    attention: str = setting(
        "auto",
        "attention implementation; auto selects the fastest for the device (blocked: CPU, cudnn: GPU, splash: TPU)",
        choices=("auto", "blocked", "xla", "cudnn", "splash"),
        free=True,
    )
    parametrization: str = setting(
        "standard",
        "how initialization and learning rates scale with size; mup reuses a smaller model's hyper-parameters",
        choices=("standard", "mup"),
    )
    base_embed_dim: int | None = setting(None, "mup only: embed_dim of the smaller model", low=1, high=LARGEST)
    base_head_size: int | None = setting(
        None, "mup only: head size of the smaller model; defaults to this model's value", low=1, high=LARGEST
    )
    base_num_layers: int | None = setting(
        None, "mup only: num_layers of the smaller model; defaults to this model's value", low=1, high=LARGEST
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.head_dim  # raises if the number of heads does not divide the width
        if self.parametrization == "mup" and self.base_embed_dim is None:
            raise InputError(
                "model.base_embed_dim is missing; model.parametrization mup requires the width at which "
                "the hyper-parameters were tuned"
            )
        for name in ("base_embed_dim", "base_head_size", "base_num_layers"):
            if self.parametrization == "standard" and (value := getattr(self, name)) is not None:
                raise InputError(
                    f"model.{name} is {value}, but model.parametrization is 'standard'; use mup or omit it"
                )

    @property
    def head_dim(self) -> int:
        """The size of each head's queries, keys and values."""
        check_divisor("model.num_heads", self.num_heads, "model.embed_dim", self.embed_dim)
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """The hidden width of the MLP."""
        raise not_defined(self, "mlp_dim")

    @property
    def growth(self) -> Growth:
        if self.parametrization == "standard":
            return Growth()
        width, layers = self.base_embed_dim or self.embed_dim, self.base_num_layers or self.num_layers
        return Growth(self.embed_dim / width, self.num_layers / layers)

    @property
    def query_factor(self) -> float:
        """The factor applied to queries. With mup, scores are q k / head_size times sqrt(base head size)."""
        base = self.base_head_size or self.head_dim
        return 1.0 if self.parametrization == "standard" else (base / self.head_dim) ** 0.5

    @property
    def block_factor(self) -> float:
        """The factor applied to attention and MLP outputs: 1 / depth with mup (arXiv 2505.01618, alpha = 1)."""
        return 1 / self.growth.depth

    @property
    def logits_factor(self) -> float:
        """The factor applied to final hidden states, and thus to logits: 1 / width with mup, even with a tied head."""
        return 1 / self.growth.width

    def forward_factors(self) -> dict[str, float]:
        return {"queries": self.query_factor, "block outputs": self.block_factor, "logits": self.logits_factor}

    def weight_std(self, *, hidden: bool = False, residual: bool = False) -> float:
        """Return the standard deviation of initial weights.

        Args:
            hidden: whether the weights map between hidden states. With mup, their variance is divided by the width.
            residual: whether the weights write to the residual stream; if so, divide by sqrt(2 x base num_layers).
        """
        width, depth = self.growth
        std = self.initializer_range * ((2 * self.num_layers / depth) ** -0.5 if residual else 1)
        return std * (width**-0.5 if hidden else 1)

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        return super().axis_sizes() | {
            "embed": ("model.embed_dim", self.embed_dim),
            "heads": ("model.num_heads", self.num_heads),
            "layers": ("model.num_layers", self.num_layers),
        }

    def describe(self) -> str:
        layers, heads = counted(self.num_layers, "layer"), f"{counted(self.num_heads, 'head')}{self._key_heads}"
        return f"{layers}, {heads}, {self.embed_dim:,} wide, {counted(self.seq_len, 'position')}"

    @property
    def _key_heads(self) -> str:
        """The number of key/value heads as text for `describe`; empty if it equals the number of query heads."""
        return ""

    def attention_on(self, platform: str, dtype: str, *, split_positions: bool, documents: bool = False) -> str:
        from sophia_levanter.models.attention import Requirements, attention_for

        required = Requirements(
            platform,
            dtype,
            self.seq_len,
            self.head_dim,
            split_positions=split_positions,
            dropout=self.dropout > 0,
            documents=documents,
        )
        return attention_for(self.attention, required)

    @property
    def Embed(self) -> Axis:
        return _axis("embed", self.embed_dim)

    @property
    def Heads(self) -> Axis:
        return _axis("heads", self.num_heads)

    @property
    def KVHeads(self) -> Axis:
        """The axis of the key/value heads."""
        return self.Heads

    @property
    def HeadSize(self) -> Axis:
        return _axis("head_size", self.head_dim)

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

    mlp_ratio: int = setting(4, "hidden width of the MLP as a multiple of embed_dim", low=1, high=LARGEST)
    use_bias: bool = setting(False, "use biases in linear layers and layer norms")
    scale_attn_by_inverse_layer_idx: bool = setting(
        False, "divide attention scores by layer index + 1, where the index starts at 0"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_attn_by_inverse_layer_idx and self.growth.depth != 1:
            raise InputError(
                f"model.base_num_layers is {self.base_num_layers}, but model.scale_attn_by_inverse_layer_idx makes "
                "attention scores depend on depth; omit one of them"
            )

    def build(self, *, vocab_size: int, key: jax.Array) -> LanguageModel:
        from sophia_levanter.models.gpt2 import Gpt2

        return Gpt2.init(self, vocab_size=vocab_size, key=key)

    @property
    def mlp_dim(self) -> int:
        return self.embed_dim * self.mlp_ratio

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        return super().axis_sizes() | {"mlp": ("model.embed_dim x model.mlp_ratio", self.mlp_dim)}


@ModelConfig.register_subclass("llama")
@dataclass(frozen=True)
class LlamaConfig(TransformerConfig):
    """A decoder in the style of Llama (Touvron et al. 2023) or, with `qk_norm`, of Qwen3 (2025).

    Raises:
        InputError: if a value is out of bounds, `num_kv_heads` does not divide `num_heads`, or the head size is odd
            (rotary position embeddings rotate pairs of coordinates).
    """

    title: ClassVar[str] = "Llama"

    num_kv_heads: int | None = setting(
        None, "number of key/value heads; must divide num_heads; defaults to num_heads", low=1, high=LARGEST
    )
    head_size: int | None = setting(None, "head size; defaults to embed_dim / num_heads", low=2, high=LARGEST)
    intermediate_dim: int | None = setting(
        None,
        "hidden width of the MLP; defaults to 8/3 of embed_dim, rounded up to a multiple of 64",
        low=1,
        high=LARGEST,
    )
    rope_theta: float = setting(10000.0, "base period of the rotary position embeddings", above=0)
    qk_norm: bool = setting(False, "apply RMSNorm to each head's queries and keys, as in Qwen3")
    tie_embeddings: bool = setting(False, "use the token embedding as the output head")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisor("model.num_kv_heads", self.kv_heads, "model.num_heads", self.num_heads)
        if not self.qk_norm:  # Llama in transformers requires this regardless of the head size
            check_divisor("model.num_heads", self.num_heads, "model.embed_dim", self.embed_dim)
        if self.head_dim % 2:
            raise InputError(
                f"the head size is {self.head_dim}, but rotary position embeddings require an even size; "
                "set model.head_size or change model.num_heads"
            )

    def build(self, *, vocab_size: int, key: jax.Array) -> LanguageModel:
        from sophia_levanter.models.llama import Llama

        return Llama.init(self, vocab_size=vocab_size, key=key)

    def explicit(self) -> LlamaConfig:
        return replace(self, num_kv_heads=self.kv_heads, head_size=self.head_dim, intermediate_dim=self.mlp_dim)

    @property
    def head_dim(self) -> int:
        return super().head_dim if self.head_size is None else self.head_size

    @property
    def mlp_dim(self) -> int:
        return -(-8 * self.embed_dim // 192) * 64 if self.intermediate_dim is None else self.intermediate_dim

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def KVHeads(self) -> Axis:
        return self.Heads if self.kv_heads == self.num_heads else _axis("kv_heads", self.kv_heads)

    def axis_sizes(self) -> dict[str, tuple[str, int]]:
        return super().axis_sizes() | {
            "kv_heads": ("model.num_kv_heads", self.kv_heads),
            "mlp": ("model.intermediate_dim", self.mlp_dim),
        }

    @property
    def _key_heads(self) -> str:
        return "" if self.kv_heads == self.num_heads else f" ({counted(self.kv_heads, 'key/value head')})"


def check_divisor(name: str, divisor: int, other: str, number: int) -> None:
    """Check that one setting divides another.

    Raises:
        InputError: if there is a remainder; the message names both settings and the nearest divisor.
    """
    if number % divisor:
        nearest = min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - divisor))
        raise InputError(f"{name} {divisor} does not divide {other} {number}; use a divisor, such as {nearest}")


def pad_vocab(vocab_size: int) -> int:
    """Round the vocabulary size up to a multiple of 128, for efficiency on matrix units."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _axis(name: str, size: int) -> Axis:
    from haliax import Axis

    return Axis(name, size)
