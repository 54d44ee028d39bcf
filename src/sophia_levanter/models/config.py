"""The shape of a GPT-2 model, and how tokens are drawn from it. Free of jax, so that a command line can be checked
at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from haliax import Axis

VOCAB_MULTIPLE = 128
ATTENTIONS = ("auto", "blocked", "xla", "cudnn", "splash")
SMALLEST_TEMPERATURE = 1e-6  # logits divided by less may not be finite
LARGEST = 2**20  # of any size of a model
CHECKPOINTING_POLICIES = ("none", "full", "dots", "offload")


@dataclass(frozen=True)
class Gpt2Config:
    """A GPT-2 model (Radford et al. 2019); the vocabulary's size comes from the tokenizer.

    Raises:
        InputError: if a size is not positive, the heads do not divide the width, or a rate is not in [0, 1).
    """

    num_layers: int = 12  # transformer blocks
    num_heads: int = 12  # attention heads; must divide embed_dim
    embed_dim: int = 768  # width of the residual stream
    seq_len: int = 1024  # tokens in a training window; the longest context
    mlp_ratio: int = 4  # the MLP's hidden width over embed_dim
    vocab_rows: int | None = None  # of the token embedding, if more than the tokenizer's tokens; never predicted
    use_bias: bool = False  # biases in linear layers and layer norms
    scale_attn_by_inverse_layer_idx: bool = False  # divide attention scores of layer i (from 0) by i + 1
    dropout: float = 0.0  # on embeddings, attention weights and each block's two outputs
    layer_norm_epsilon: float = 1e-5  # added to the variance in layer norms
    initializer_range: float = 0.02  # standard deviation of the initial weights
    gradient_checkpointing: str = "full"  # a block's backward pass computes again: none, full, or all but dots; offload
    scan_unroll: int = 1  # layers in one step of the scan over them: more compile longer and run faster on CPUs
    attention: str = "auto"  # blocked (CPUs), cudnn (GPUs), splash (TPUs), xla, or auto for what suits the device
    loss_block_size: int = 256  # positions whose logits exist at one time in the loss

    def __post_init__(self) -> None:
        names = ("num_layers", "num_heads", "embed_dim", "seq_len", "mlp_ratio", "scan_unroll", "loss_block_size")
        for name in names if self.vocab_rows is None else (*names, "vocab_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
            if getattr(self, name) > LARGEST:
                raise InputError(f"model.{name} is {getattr(self, name)}; it must be at most {LARGEST}")
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"model.num_heads {self.num_heads} does not divide model.embed_dim {self.embed_dim}; "
                f"{_nearest_divisor(self.embed_dim, self.num_heads)} would"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout is {self.dropout}; it must be in [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not getattr(self, name) > 0:
                raise InputError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        if self.attention not in ATTENTIONS:
            raise InputError(f"model.attention is {self.attention!r}; it must be one of {', '.join(ATTENTIONS)}")
        if self.gradient_checkpointing not in CHECKPOINTING_POLICIES:
            raise InputError(
                f"model.gradient_checkpointing is {self.gradient_checkpointing!r}; "
                f"it must be one of {', '.join(CHECKPOINTING_POLICIES)}"
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


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the temperature is applied first, then `top_k`, then `top_p`.

    Raises:
        InputError: if a number is out of its range.
    """

    temperature: float = 0.8  # logits are divided by it; 0 takes the likeliest token
    top_k: int | None = None  # only from so many of the likeliest tokens, and those that are as likely as the last
    top_p: float | None = None  # only from the fewest of the likeliest tokens that have this probability together

    def __post_init__(self) -> None:
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0, for the likeliest token, or from "
                f"{SMALLEST_TEMPERATURE} on"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def attention_for(
    wanted: str,
    platform: str,
    dtype: str,
    positions: int,
    head_size: int,
    *,
    split_positions: bool = False,
    dropout: bool = False,
) -> str:
    """The implementation of attention that is used: the wanted one, or for `auto` the fastest that can do it.

    Args:
        wanted: one of `ATTENTIONS`.
        platform: `cpu`, `gpu` or `tpu`.
        dtype: of queries, keys and values.
        positions, head_size: their sizes.
        split_positions: whether positions are split over devices.
        dropout: whether some of the attention's weights are dropped.

    Raises:
        InputError: if the wanted one cannot do it; says why.
    """
    if wanted == "xla":
        return wanted
    reasons = {
        name: "has no dropout (model.dropout)"
        if dropout
        else _why_not(name, platform, dtype, positions, head_size, split_positions)
        for name in ("cudnn", "splash", "blocked")
    }
    if wanted == "auto":
        fastest = {"gpu": "cudnn", "tpu": "splash", "cpu": "blocked"}.get(platform, "xla")
        return fastest if reasons.get(fastest) is None else "xla"
    if reasons[wanted] is not None:
        raise InputError(f"model.attention is {wanted!r}, which {reasons[wanted]}; auto or xla would do")
    return wanted


def _why_not(name: str, platform: str, dtype: str, positions: int, head_size: int, split_positions: bool) -> str | None:
    """Why an implementation cannot be used, or None."""
    device = {"cudnn": "gpu", "splash": "tpu"}.get(name, platform)
    if platform != device:
        return f"needs a {device.upper()}, and this is a {platform.upper()}"
    if split_positions:
        return "cannot split positions over devices (mesh.sequence)"
    if name == "cudnn":
        if dtype != "bfloat16":
            return f"needs trainer.compute_dtype bfloat16, not {dtype}"
        if head_size % 8 or head_size > 128:
            return f"needs heads of a multiple of 8 up to 128, not {head_size}"
    elif name == "splash" and positions % 128:
        return f"needs a multiple of 128 positions, not {positions}"
    return None


def _axis(name: str, size: int) -> Axis:
    from haliax import Axis

    return Axis(name, size)


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


def pad_vocab(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 128, as matrix units like it."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
