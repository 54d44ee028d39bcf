"""The models that can be exchanged with transformers: their weight names and `config.json` fields."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sophia_levanter.config.model import Gpt2Config, LlamaConfig, ModelConfig, TransformerConfig
from sophia_levanter.errors import InputError, one_line, shortened

_LONGEST_NAME = 100
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")


class WeightsError(InputError):
    """Raised if a weights file is invalid. The message starts with the name of the file."""


def input_error(file: Path, text: str) -> WeightsError:
    """Return a `WeightsError` about a file."""
    return WeightsError(f"{file}: {text}")


def shown(name: str, longest: int = _LONGEST_NAME) -> str:
    """Make text from a file safe to print, by shortening it and escaping control characters."""
    return shortened(one_line(name), longest)


@dataclass(frozen=True)
class Description:
    """The fields of a `config.json`, or the model_args of a nanoGPT checkpoint."""

    file: Path
    values: Mapping[str, Any]  # not checked yet

    def value(self, name: str, kind: Any, default: Any = None) -> Any:
        """Return the value of a field, which must have the type `kind`. Numbers must be positive.

        Raises:
            InputError: if the value has a different type, or is a number that is not positive.
        """
        value: Any = self.values.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is not bool and not value > 0):
            wanted = {bool: "true or false", int: "a positive integer", float: "a positive number"}[kind]
            raise self.error(name, f"it must be {wanted}", value)
        return value

    def require(self, name: str, wanted: Any, reason: str) -> None:
        """Check that a field is missing or has the required value.

        Raises:
            InputError: if the field has a different value; the message gives the reason.
        """
        if self.values.get(name, wanted) != wanted:
            raise self.error(name, reason)

    def error(self, name: str, text: str, value: Any = None) -> WeightsError:
        """Return a `WeightsError` about a field."""
        value = self.values.get(name) if value is None else value
        as_written = str(value).lower() if isinstance(value, bool) else shown(repr(value))
        return input_error(self.file, f"{name} is {as_written}; {text}")


class Architecture(abc.ABC):
    """A model architecture: the weight names and `config.json` fields that transformers uses for it.

    Attributes:
        model_types: the values of `model_type` in `config.json` that identify the architecture.
        config_class: the class of the model's settings in this package.
        prefix: the prefix of all weight names except `lm_head.weight`.
        layers: the name that precedes the layer number in weight names; in this package, it is `blocks`.
        layout: the matrix layout: `conv1d` for [in, out], `linear` for torch.nn.Linear's [out, in].
        embedding: the name of the token embedding, without the prefix.
        always_has_biases: whether the model in transformers has biases even if the model in this package has none.
    """

    model_types: ClassVar[tuple[str, ...]]
    config_class: ClassVar[type[TransformerConfig]]
    prefix: ClassVar[str]
    layers: ClassVar[str]
    layout: str
    embedding: ClassVar[str]
    always_has_biases: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The model's name, for messages."""
        return self.config_class.title

    @abc.abstractmethod
    def fields(self, given: Description) -> dict[str, Any]:
        """Return the settings, except `use_bias`, of an equivalent model in this package.

        Raises:
            InputError: if this package has no equivalent model; the message names the field.
        """

    @abc.abstractmethod
    def sizes(self, given: Description) -> dict[str, int]:
        """Return the numbers of layers, embedding rows, embedding columns and any learned positions, in this order.

        The keys are field names. For fields missing from `config.json`, the default values of transformers are used.
        """

    @abc.abstractmethod
    def describe(self, config: Any) -> dict[str, Any]:
        """Return the `config.json` fields for a model with this architecture; the inverse of `fields`."""

    @abc.abstractmethod
    def export_factors(self, config: Any) -> dict[str, float]:
        """Return the factors of the parametrization, keyed by the end of the layer name."""

    def fold_factors(self, config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fold the factors of the parametrization into the weights, because transformers cannot apply them."""

        def multiply(name: str, array: np.ndarray) -> np.ndarray:
            for end, factor in self.export_factors(config).items():
                if name.endswith((f"{end}.weight", f"{end}.bias")) and factor != 1:
                    array = (array * np.float32(factor)).astype(array.dtype)
            return array

        return {name: multiply(name, array) for name, array in arrays.items()}

    def complete(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the given weights, plus any other weights that transformers expects."""
        return dict(arrays)

    @abc.abstractmethod
    def seq_len(self, given: Description) -> int:
        """Return the maximum context length of the described model."""


class Gpt2Architecture(Architecture):
    """The architecture of `GPT2LMHeadModel` in transformers and of `GPT` in nanoGPT.

    `positions` is the name of the field that contains the number of positions.
    """

    model_types = ("gpt2",)
    config_class = Gpt2Config
    prefix = "transformer."
    layers = "h"
    embedding = "wte.weight"
    always_has_biases = True

    def __init__(self, *, layout: str = "conv1d", positions: str = "n_positions") -> None:
        self.layout, self.positions = layout, positions

    def sizes(self, given: Description) -> dict[str, int]:
        defaults = {"n_layer": 12, "vocab_size": 50257, "n_embd": 768, self.positions: 1024}
        return {name: given.value(name, int, default) for name, default in defaults.items()}

    def seq_len(self, given: Description) -> int:
        return self.sizes(given)[self.positions]

    def fields(self, given: Description) -> dict[str, Any]:
        if given.values.get("activation_function", "gelu_new") not in _TANH_GELUS:
            raise given.error("activation_function", f"this model supports only {' and '.join(_TANH_GELUS)}")
        given.require(
            "scale_attn_weights", True, "this model always divides scores by the square root of the head size"
        )
        sizes = self.sizes(given)
        width = sizes["n_embd"]
        inner = 4 * width if given.values.get("n_inner") is None else given.value("n_inner", int)
        if inner % width:
            raise given.error("n_inner", f"it must be a multiple of n_embd ({width})")
        return {
            "num_layers": sizes["n_layer"],
            "num_heads": given.value("n_head", int, 12),
            "embed_dim": width,
            "seq_len": sizes[self.positions],
            "mlp_ratio": inner // width,
            "scale_attn_by_inverse_layer_idx": given.value("scale_attn_by_inverse_layer_idx", bool, False),
            "layer_norm_epsilon": given.value("layer_norm_epsilon", float, 1e-5),
        }

    def describe(self, config: Gpt2Config) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "attn_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "initializer_range": config.initializer_range,
            "layer_norm_epsilon": config.layer_norm_epsilon,
            "n_embd": config.embed_dim,
            "n_head": config.num_heads,
            "n_inner": config.mlp_dim,
            "n_layer": config.num_layers,
            "n_positions": config.seq_len,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        }

    def export_factors(self, config: Gpt2Config) -> dict[str, float]:
        return {"c_proj": config.block_factor, "ln_f": config.logits_factor}

    def fold_factors(self, config: Gpt2Config, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        def queries(name: str, array: np.ndarray) -> np.ndarray:
            if ".c_attn." not in name or config.query_factor == 1:
                return array
            factors = np.repeat(np.asarray([config.query_factor, 1, 1], np.float32), array.shape[-1] // 3)
            return (array * factors).astype(array.dtype)

        return {name: queries(name, array) for name, array in super().fold_factors(config, arrays).items()}

    def complete(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add zeros for missing biases, because GPT-2 in transformers always has biases."""
        biases = {
            name.removesuffix("weight") + "bias": np.zeros(array.shape[-1:], array.dtype)
            for name, array in arrays.items()
            if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight"))
        }
        return biases | dict(arrays)


class LlamaArchitecture(Architecture):
    """The architecture of `LlamaForCausalLM`, and of `Qwen3ForCausalLM`, which adds RMSNorm for queries and keys."""

    model_types = ("llama", "qwen3")
    config_class = LlamaConfig
    prefix = "model."
    layers = "layers"
    layout = "linear"
    embedding = "embed_tokens.weight"

    _DEFAULTS: ClassVar[dict[str, dict[str, int]]] = {
        "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
        "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    }

    def _default(self, given: Description, name: str) -> int:
        return self._DEFAULTS[given.values["model_type"]][name]

    def sizes(self, given: Description) -> dict[str, int]:
        return {
            "num_hidden_layers": given.value("num_hidden_layers", int, 32),
            "vocab_size": given.value("vocab_size", int, self._default(given, "vocab_size")),
            "hidden_size": given.value("hidden_size", int, 4096),
        }

    def seq_len(self, given: Description) -> int:
        return given.value("max_position_embeddings", int, self._default(given, "max_position_embeddings"))

    def fields(self, given: Description) -> dict[str, Any]:
        qwen = given.values["model_type"] == "qwen3"
        given.require("hidden_act", "silu", "this model supports only silu")
        for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
            given.require(name, False, "this model does not support it; use weights trained without it")
        given.require("partial_rotary_factor", 1.0, "this model supports only 1.0")
        sizes = self.sizes(given)
        width, heads = sizes["hidden_size"], given.value("num_attention_heads", int, 32)
        # Qwen3 has its own defaults for missing fields. Null fields get Llama's defaults.
        kv_heads = 32 if qwen and "num_key_value_heads" not in given.values else heads
        head_size = 128 if qwen and "head_dim" not in given.values else width // heads
        return {
            "num_layers": sizes["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": _optional(given, "num_key_value_heads", kv_heads),
            "head_size": _optional(given, "head_dim", head_size),
            "embed_dim": width,
            "intermediate_dim": given.value("intermediate_size", int, self._default(given, "intermediate_size")),
            "rope_theta": self._rope_theta(given),
            "qk_norm": qwen,
            "tie_embeddings": given.value("tie_word_embeddings", bool, False),
            "layer_norm_epsilon": given.value("rms_norm_eps", float, 1e-6),
        }

    def export_factors(self, config: LlamaConfig) -> dict[str, float]:
        return {
            "q_norm" if config.qk_norm else "q_proj": config.query_factor,
            "o_proj": config.block_factor,
            "down_proj": config.block_factor,
            "model.norm": config.logits_factor,
        }

    @staticmethod
    def _rope_theta(given: Description) -> float:
        """Return the base of the rotary position embeddings, which transformers 4 and 5 store in different fields."""
        name = "rope_scaling" if given.values.get("rope_scaling") else "rope_parameters"
        rope = given.values.get(name) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise given.error(name, "this model uses the same rotary embeddings in all layers")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise given.error(name, "this model does not support RoPE scaling")
        outside = given.value("rope_theta", float, 10000.0)
        return Description(given.file, rope).value("rope_theta", float, outside)

    def describe(self, config: LlamaConfig) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if config.qk_norm else "llama",
            "attention_bias": False,
            "attention_dropout": config.dropout,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.embed_dim,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.mlp_dim,
            "max_position_embeddings": config.seq_len,
            "num_attention_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "num_key_value_heads": config.kv_heads,
            "rms_norm_eps": config.layer_norm_epsilon,
            "rope_theta": config.rope_theta,  # for transformers 4; version 5 reads the next field
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": config.tie_embeddings,
        }


GPT2 = Gpt2Architecture()
ARCHITECTURES: tuple[Architecture, ...] = (GPT2, LlamaArchitecture())
NANOGPT = Gpt2Architecture(layout="linear", positions="block_size")


def architecture_of_type(file: Path, model_type: Any) -> Architecture:
    """Return the architecture for the `model_type` in a `config.json`.

    Raises:
        InputError: if this package does not support it.
    """
    known = {name: architecture for architecture in ARCHITECTURES for name in architecture.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise input_error(file, f"model_type is {shown(repr(model_type))}; it must be one of {', '.join(known)}")
    return known[model_type]


def architecture_of(config: ModelConfig) -> Architecture:
    """Return the architecture of a model in this package.

    Raises:
        InputError: if transformers has no equivalent model.
    """
    for architecture in ARCHITECTURES:
        if type(config) is architecture.config_class:
            return architecture
    titles = " and ".join(architecture.title for architecture in ARCHITECTURES)
    raise InputError(
        f"model.type is {config.get_choice_name(type(config))}; only {titles} models can be loaded or exported"
    )


def _optional(given: Description, name: str, default: int) -> int:
    return default if given.values.get(name) is None else given.value(name, int)
