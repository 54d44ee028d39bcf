"""What a run sets up before it trains."""

import jax
import pytest

from sophia_levanter.run.provenance import enable_compilation_cache


@pytest.fixture
def kept_in():
    """Where jax keeps compiled programs; put back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("platform", "kept"), [("gpu", True), ("tpu", True), ("cpu", False)])
def test_accelerators_programs_are_kept(platform, kept, kept_in, tmp_path):
    enable_compilation_cache(tmp_path, platform)
    assert kept_in() == (str(tmp_path) if kept else None)


def test_a_place_that_is_named_already_stays(kept_in, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    enable_compilation_cache(tmp_path, "tpu")
    assert kept_in() == str(tmp_path / "mine")
