"""The whole suite runs on eight pretended CPU devices, so that sharding is at hand in every test. All
this must be set before jax is imported, and reaches the processes that tests start."""

import functools
import gc
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sophia_levanter.allocation import return_freed_memory
from tiny_runs import FinishedRun, finish_run, write_config, write_text

flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    # At this level of optimisation the other scheduler lets devices enter all-reduces in different orders, for ever.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
]
if version("jaxlib").startswith("0.10."):
    # Tests compile in a third of the time. jaxlib 0.11.1 and later have no other emitters, and end at a flag they do
    # not know.
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
# Workers, and the processes that tests start, share what they compile; one that is killed may leave half a program, so
# nothing stays for the next time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# jax stores where each operation was traced; pytest's calls are deep.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")
# Where libtpu is installed to compile for TPUs, jax would look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices that each decompose a matrix would wait for each other's LAPACK threads, thirty times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Ray gives its workers a niceness of 15; beside the other worker's tests they would wait until timeouts are over.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell makes background commands ignore Ctrl-C, and nohup makes them ignore SIGHUP. The processes that tests start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TESTS = Path(__file__).parent
STATM = Path("/proc/self/statm")
MOST_BYTES = 2_500_000_000


def pytest_collection_finish():
    """Lets the garbage collector pass over what was imported, and run less often: tracing creates many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_make_parametrize_id(val):
    """Names tests alike in all workers: compressed bytes hold the time of day."""
    return "bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def little_memory():
    """Forgets compiled programs where they have filled a worker. Each one also maps memory, and XLA dies where Linux
    allows no more than its 65,530 maps of a process."""
    yield
    if STATM.exists() and int(STATM.read_text().split()[1]) * resource.getpagesize() > MOST_BYTES:
        import jax

        jax.clear_caches()
        gc.collect()
        return_freed_memory()


@pytest.fixture(scope="session", autouse=True)
def one_peak():
    """Every run asks for the peak of the CPU, which takes about a second to measure."""
    from sophia_levanter.training import costs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "_measured_matrix_rate", functools.cache(costs._measured_matrix_rate))
        yield


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some 20 kB of text with a pattern in it."""
    return write_text(tmp_path)


@pytest.fixture
def config_file(tmp_path: Path, text_file: Path) -> Path:
    """The configuration of a tiny run on that text, for `--config`."""
    return write_config(tmp_path, text_file)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of the tiny configuration, trained once for all tests that read one; a test changes only a copy."""
    return finish_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def plugin_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for plug-ins, on the path beside the shipped ones; what they register is forgotten after the test."""
    from sophia_levanter.config.model import ModelConfig
    from sophia_levanter.config.optimizer import OptimizerConfig
    from sophia_levanter.config.registries import CALLBACKS, METRICS
    from sophia_levanter.config.schedule import ScheduleConfig
    from sophia_levanter.data.sources import DataSource

    shipped, folder = (TESTS / "plugins", TESTS.parent / "docs/evidence/speedrun"), tmp_path / "plugins"
    folder.mkdir()
    registries: list[dict[str, Any]] = [
        METRICS,
        CALLBACKS,
        *(registry.get_known_choices() for registry in (OptimizerConfig, ScheduleConfig, ModelConfig, DataSource)),
    ]
    before, modules = [dict(choices) for choices in registries], set(sys.modules)
    for place in (*shipped, folder):
        monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, shipped), os.environ.get("PYTHONPATH", "")]))
    yield folder
    for choices, known in zip(registries, before, strict=True):
        for name in set(choices) - set(known):
            del choices[name]
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent in (*shipped, folder):
            del sys.modules[name]


@pytest.fixture
def golden():
    """Arrays measured from other people's programs, by the name of their file."""
    import numpy as np

    return lambda name: np.load(Path(__file__).parent / "golden" / f"{name}.npz")


@pytest.fixture
def make_model():
    """A tiny model, by default a GPT-2, with weights large enough for the layers to matter."""
    from sophia_levanter.models.gpt2 import Gpt2Config

    def make(vocab_size=100, config_class=Gpt2Config, **changes):
        shape = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "seq_len": 8, "loss_block_size": 3}
        return draw_model(config_class(**(shape | {"gradient_checkpointing": "none"} | changes)), vocab_size)

    return make


def draw_model(config, vocab_size):
    """A model with normal weights of standard deviation 0.3, biases and norms as well."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sophia_levanter.models.language_model import abstract_model

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), abstract_model(config, vocab_size)
    )


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """A folder as transformers saves GPT-2: that configuration's shape with biases, weights larger than drawn ones."""
    import equinox as eqx
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from sophia_levanter.models.gpt2 import Gpt2, Gpt2Config
    from sophia_levanter.models.huggingface import gpt2_to_state_dict

    config = Gpt2Config(num_layers=2, num_heads=2, embed_dim=16, seq_len=16, use_bias=True)
    drawn = gpt2_to_state_dict(eqx.filter_jit(Gpt2.init)(config, vocab_size=257, key=jax.random.key(7)))
    folder = tmp_path / "gpt2"
    folder.mkdir()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 257}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    arrays = {name: np.ascontiguousarray(10 * array + 0.01) for name, array in drawn.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Does something once the metrics of a step are logged."""
    from sophia_levanter.tracking.jsonl import JsonLines

    def plan(step: int, act: Callable[[], object]) -> None:
        log = JsonLines.log

        def log_and_act(self, at, numbers):
            log(self, at, numbers)
            if at == step and "train/loss" in numbers:
                monkeypatch.setattr(JsonLines, "log", log)
                act()

        monkeypatch.setattr(JsonLines, "log", log_and_act)

    return plan


@pytest.fixture
def stop_after(after_step):
    """Makes the process get a signal when the metrics of a step are logged."""

    def plan(step: int, number: signal.Signals = signal.SIGINT) -> None:
        after_step(step, lambda: signal.raise_signal(number))

    return plan
