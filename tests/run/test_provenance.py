"""jax's settings in a run: the numbers do not depend on its variables, or the run says that they may."""

import jax
import jax.numpy as jnp
import pytest

from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.run import run
from sophia_levanter.run.provenance import (
    FIXED,
    RECORDED,
    enable_compilation_cache,
    fixed_settings,
    recorded_environment,
)

OTHERS = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 5,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


@pytest.fixture(params=OTHERS)
def other_setting(request):
    """The name of a setting that a variable has changed; put back afterwards."""
    before = jax.config.values[request.param]
    jax.config.update(request.param, OTHERS[request.param])
    yield request.param
    jax.config.update(request.param, before)


def numbers():
    drawn = jax.random.uniform(jax.random.key(3), (2, 3))
    return jnp.arange(3) * drawn + drawn[0]


def test_draws_and_dtypes_are_those_of_the_default_settings(other_setting):
    with fixed_settings():
        found = numbers()
        assert jax.config.values[other_setting] == FIXED[other_setting]
    assert jax.config.values[other_setting] == OTHERS[other_setting]
    jax.config.update(other_setting, FIXED[other_setting])
    wanted = numbers()
    assert (found.dtype, found.tolist()) == (wanted.dtype, wanted.tolist())


@pytest.mark.parametrize("other_setting", ["jax_random_seed_offset"], indirect=True)
def test_a_run_has_the_fixed_settings(other_setting, config_file, tmp_path, monkeypatch):
    seen = []

    def look(config):
        seen.append(jax.config.values[other_setting])
        raise InputError("enough was seen")

    monkeypatch.setattr(run, "start_processes", look)
    assert main(["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]) == 2
    assert seen == [FIXED[other_setting]]
    assert jax.config.values[other_setting] == OTHERS[other_setting]


@pytest.mark.parametrize("name", RECORDED)
def test_a_variable_is_recorded_where_it_is_set(name, monkeypatch):
    for other in RECORDED:
        monkeypatch.delenv(other, raising=False)
    # Runs that began before the variable was listed recorded these alone.
    assert list(recorded_environment()) == ["jax", "cpu_threads", "XLA_FLAGS"]
    monkeypatch.setenv(name, "")
    assert name not in recorded_environment()
    monkeypatch.setenv(name, "1")
    assert recorded_environment()[name] == "1"


def test_a_resumed_run_names_the_variables_that_differ(finished_run, tmp_path, capfd, monkeypatch):
    run_dir = finished_run.copy(tmp_path / "run")
    assert main(["--resume", str(run_dir)]) == 0
    assert "may differ" not in capfd.readouterr().out
    for name, value in {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "LIBTPU_INIT_ARGS": "--xla_x",
        "XLA_FLAGS": "",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert main(["--resume", str(run_dir)]) == 0
        (line,) = [line for line in capfd.readouterr().out.splitlines() if "may differ" in line]
        assert f"'{name}': '{value}'" in line


def test_a_run_without_compilation_is_refused(config_file, tmp_path, capfd):
    jax.config.update("jax_disable_jit", True)
    try:
        assert main(["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]) == 2
    finally:
        jax.config.update("jax_disable_jit", False)
    error = capfd.readouterr().err
    assert error.startswith("error: JAX_DISABLE_JIT is set, but ") and error.count("\n") == 1


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
