"""Parameter groups from the settings to a run."""

import equinox as eqx
import jax
import numpy as np
import pytest

from sophia_levanter.checkpoint.restoring import arrays_of
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.groups import check_groups
from sophia_levanter.config.optimizer import build_optimizer
from sophia_levanter.errors import InputError
from sophia_levanter.main import main
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.run.loading import load_model


def test_a_rate_and_a_factor_mean_the_same(config_file):
    optimizers = []
    for rate in ("0.1 x", "1e-3"):
        value = f"[{{match: mlp, learning_rate: {rate}, weight_decay: 0.25}}]"
        config = load_config(config_file, [("optimizer.groups", value)])
        optimizers.append(build_optimizer(config.optimizer, 12))
    (first,), (second,) = (optimizer.groups for optimizer in optimizers)
    assert (first.match, first.weight_decay) == (second.match, second.weight_decay) == ("mlp", 0.25)
    assert first.learning_rate == pytest.approx(second.learning_rate) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{learning_rate: 0.1 x}", "optimizer.groups: match is missing; a group requires either match or role"),
        ("{match: a, role: matrix}", "optimizer.groups: match 'a' and role 'matrix' are both set; keep one"),
        ("{role: heads}", "optimizer.groups.role is 'heads'; it must be one of embedding, head, matrix, vector, or"),
        ("{match: '('}", "optimizer.groups: match '(' is not a valid regular expression: "),
        ("{match: a, learning_rate: ten x}", "optimizer.groups: learning_rate is 'ten x'; it must be a number, or a "),
        (
            "{match: a, learning_rate: 1.2.3x}",
            "optimizer.groups: learning_rate is '1.2.3x'; it must be a number, or a ",
        ),
        (
            "{match: a, learning_rate: -1}",
            "optimizer.groups: learning_rate is -1.0; it must be a number, or a multiple",
        ),
        ("{match: a, weight_decay: -1}", "optimizer.groups.weight_decay is -1.0; it must be at least 0"),
        ("{match: a, rate: 1}", "optimizer.groups[0].rate is unknown; valid fields are match, learning_rate, "),
    ],
)
def test_bad_settings(config_file, group, message):
    with pytest.raises(InputError) as raised:
        load_config(config_file, [("optimizer.groups", f"[{group}]")])
    assert message in str(raised.value)


def test_a_group_that_matches_nothing_ends_the_run_before_it_begins(config_file, tmp_path, capfd):
    command = ["--config", str(config_file), "--trainer.run_dir", str(tmp_path / "run")]
    assert main([*command, "--optimizer.groups", "[{match: wtx}]"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: optimizer.groups[0].match 'wtx' matches no parameter; choose from ['")
    assert not (tmp_path / "run").exists()


def test_a_role_that_nothing_has(config_file):
    """The head of this model is its token embedding."""
    config = load_config(config_file, [("optimizer.groups", "[{role: head}]")])
    with pytest.raises(InputError) as raised:
        check_groups(config.optimizer.parameter_groups, abstract_model(config.model, 257))
    wanted = "optimizer.groups[0].role 'head' matches no parameter; choose from ['embedding', 'matrix', 'vector']"
    assert str(raised.value) == wanted


def test_a_run_with_groups(config_file, tmp_path, capfd, stop_after):
    """Embeddings that do not move, and the table that says so; it resumes."""
    groups = "[{match: wte|wpe, learning_rate: 0 x, weight_decay: 0}]"
    command = ["--config", str(config_file), "--optimizer.groups", groups]
    command += ["--optimizer.type", "adamw", "--trainer.run_dir", str(tmp_path / "run")]
    stop_after(1)
    assert main(command) == 130
    assert "group: wte|wpe: 2 arrays, learning rate 0, weight decay 0" in capfd.readouterr().out
    assert main([*command, "--resume", "auto"]) == 0
    loaded = load_model(str(tmp_path / "run"), report=print)
    drawn = eqx.filter_jit(loaded.config.model.build)(vocab_size=257, key=jax.random.key(0))
    first, last = arrays_of(drawn), arrays_of(loaded.model)
    still = {path for path in first if np.allclose(first[path], last[path], atol=1e-6)}
    assert still == {"wte.weight", "wpe.weight"} and len(first) > len(still)


def test_paths_are_those_of_checkpoints(config_file):
    """The names in `checkpoints show` are what `match` is searched in, after `model.`."""
    from sophia_levanter.optim import ParameterGroup, groups_of

    model = abstract_model(load_config(config_file).model, 257)
    assert set(groups_of([ParameterGroup("")], model)) == set(arrays_of(model))
