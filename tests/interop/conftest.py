from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from weight_files import VOCAB, save_folder

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import Gpt2Config, TransformerConfig
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.interop.state_dict import gpt2_to_state_dict
from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.run.loading import LoadedModel


def draw(config: TransformerConfig, vocab_size: int) -> Any:
    """A model with random weights, biases as well, on the host."""
    rng = np.random.default_rng(0)
    template = abstract_model(config, vocab_size)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), template)


@pytest.fixture
def make_loaded() -> Callable[..., LoadedModel]:
    """Such a model as `load_model` gives it, its parameters split over the devices."""

    def make(
        tokenizer: str = "bytes", config_class: type[TransformerConfig] = Gpt2Config, **changes: Any
    ) -> LoadedModel:
        shape = {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "seq_len": 32, "gradient_checkpointing": "none"}
        config = config_class(**(shape | changes))
        tokens = load_tokenizer(tokenizer)
        weights = draw(config, tokens.vocab_size)
        partition = partition_of(MeshConfig(fsdp="embed"))
        source = "step 7 of runs/some"
        return LoadedModel(partition.place(weights), TrainConfig(model=config), tokens, partition, source, 7)

    return make


@pytest.fixture(scope="session")
def model() -> Gpt2:
    """A GPT-2 with biases. Tests only read it."""
    shape = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "seq_len": 8, "loss_block_size": 3}
    return draw(Gpt2Config(**shape, use_bias=True, gradient_checkpointing="none"), VOCAB)


@pytest.fixture(scope="session")
def arrays(model: Gpt2) -> dict[str, np.ndarray]:
    """That model's weights, by the names of transformers. Tests only read them."""
    return gpt2_to_state_dict(model)


@pytest.fixture
def folder(model: Gpt2, arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """That model as transformers saves it."""
    return save_folder(tmp_path / "gpt2", model.config, arrays)
