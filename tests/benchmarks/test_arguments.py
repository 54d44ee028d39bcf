import argparse
from pathlib import Path

import pytest

from sophia_levanter.benchmarks.arguments import parse_with_overrides
from sophia_levanter.errors import InputError


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[0])
    return parser


def test_overrides_stand_among_the_options_and_the_last_counts(parser, tiny):
    words = ["--optimizer.rho=0.2", "--config", str(tiny), "--trainer.seed", "3", "--steps", "1", "2"]
    arguments, config = parse_with_overrides(parser, [*words, "--trainer.seed", "4"])
    assert arguments.steps == [1, 2]
    assert (config.optimizer.rho, config.trainer.seed, config.trainer.num_train_steps) == (0.2, 4, 12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "3"], "unknown option '--step'"),
        (["--print_config"], "unknown option '--print_config'"),
        (["--resume=auto"], "unknown option '--resume'"),
        (["--optimizer.rhoo", "1"], "did you mean --optimizer.rho"),
        (["--optimizer.rho", "-1"], "optimizer.rho is -1"),
        (["--optimizer.rho"], "has no value"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_what_is_no_option_is_refused_by_name(parser, tiny, words, message):
    with pytest.raises(InputError, match=message):
        parse_with_overrides(parser, ["--config", str(tiny), *words])
