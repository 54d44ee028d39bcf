from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.config.model import Gpt2Config, TransformerConfig
from sophia_levanter.data.tokenizer import load_tokenizer
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.run.loading import LoadedModel


@pytest.fixture
def make_loaded() -> Callable[..., LoadedModel]:
    """A model with random weights, biases as well, as `load_model` gives it, its parameters split over the devices."""

    def make(
        tokenizer: str = "bytes", config_class: type[TransformerConfig] = Gpt2Config, **changes: Any
    ) -> LoadedModel:
        shape = {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "seq_len": 32, "gradient_checkpointing": "none"}
        config = config_class(**(shape | changes))
        tokens = load_tokenizer(tokenizer)
        template = abstract_model(config, tokens.vocab_size)
        rng = np.random.default_rng(0)
        weights = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), template)
        partition = partition_of(MeshConfig(fsdp="embed"))
        source = "step 7 of runs/some"
        return LoadedModel(partition.place(weights), TrainConfig(model=config), tokens, partition, source, 7)

    return make
