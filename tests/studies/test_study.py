"""From a study file to the configurations of its runs."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from sophia_levanter.config import TrainConfig
from sophia_levanter.config.baselines import AdamWConfig, LionConfig
from sophia_levanter.config.files import Setting
from sophia_levanter.config.optimizer import SophiaGConfig
from sophia_levanter.errors import InputError
from sophia_levanter.studies.records import find, read_records
from sophia_levanter.studies.study import PlannedRun, Study, plan, read_study

ROOT = Path(__file__).parents[2]
FOLDERS = ("config/studies", "docs/evidence/studies")
NO_STUDIES = ("base", "recommended", "both_sides")  # what studies start from
STUDIES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.yaml")) if path.stem not in NO_STUDIES]
# 100 tokens in a step.
TINY = "model: {num_layers: 1, num_heads: 1, embed_dim: 8, seq_len: 10}\ntrainer: {batch_size: 10}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "tiny.yaml").write_text(TINY)

    def write(text: str, name: str = "study.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def runs(write: Callable[..., Path]) -> Callable[..., list[PlannedRun]]:
    """The runs of a study of this text; keyword arguments are overrides, with __ for the dot."""

    def runs(text: str, **overrides: str) -> list[PlannedRun]:
        changes = {name.replace("__", "."): Setting(value) for name, value in overrides.items()}
        return plan(read_study(write(text)), changes)

    return runs


def test_a_whole_study(write):
    study = read_study(
        write(
            "config: [tiny.yaml]\ntokens: [1e3, 4000]\nseeds: 3\nevaluations: 2\nbaseline: a\n"
            "arms:\n  a: {settings: {optimizer: {type: adamw}}}\n"
            "  b: {tokens: 2000, warmup_fraction: 0, final_fraction: 1}\n"
        )
    )
    assert (study.name, study.baseline, study.evaluations) == ("study", "a", 2)
    a, b = study.arms
    assert (a.name, a.tokens, a.seeds) == ("a", (1000, 4000), (3,))
    assert (b.name, b.tokens, b.seeds) == ("b", (2000,), (3,))


def test_what_need_not_be_given(write):
    study = read_study(write("arms: {a: {tokens: 100}}"))
    assert (study.baseline, study.evaluations) == (None, 5)
    assert (study.arms[0].seeds, study.arms[0].grid, study.arms[0].tokens) == ((0,), {}, (100,))


def test_the_nearer_setting_counts(write, runs):
    """Common files, then common settings, then the arm's files, its settings, the grid and last the command line."""
    write("optimizer: {type: adamw, b1: 0.1, b2: 0.1, eps: 0.1, weight_decay: 0.1, learning_rate: 0.1}", "common.yaml")
    write("optimizer: {eps: 0.3, weight_decay: 0.3, learning_rate: 0.3}", "arm.yaml")
    (run,) = runs(
        "config: [tiny.yaml, common.yaml]\ntokens: 1000\n"
        "settings: {optimizer: {b2: 0.2, eps: 0.2, weight_decay: 0.2, learning_rate: 0.2}}\n"
        "arms:\n  a:\n    config: [arm.yaml]\n"
        "    settings: {optimizer: {weight_decay: 0.4, learning_rate: 0.4, b1: 0.4}}\n"
        "    grid: {optimizer: {learning_rate: [0.5]}}\n",
        optimizer__b1="0.6",
    )
    optimizer = run.config.optimizer
    assert isinstance(optimizer, AdamWConfig)
    assert (optimizer.b2, optimizer.eps, optimizer.weight_decay, optimizer.learning_rate) == (0.2, 0.3, 0.4, 0.5)
    assert optimizer.b1 == 0.6
    assert run.config.model.seq_len == 10


def test_an_arm_is_not_told_of_the_other_arm(runs):
    first, second = runs(
        "tokens: 1e6\nsettings: {model: {seq_len: 10}}\n"
        "arms: {a: {settings: {optimizer: {type: lion, b1: 0.5}}}, b: {settings: {optimizer: {rho: 0.5}}}}"
    )
    assert isinstance(first.config.optimizer, LionConfig) and first.config.optimizer.b1 == 0.5
    assert isinstance(second.config.optimizer, SophiaGConfig)
    assert second.config.optimizer.b1 == SophiaGConfig.b1


def test_a_study_may_start_from_another(write, runs):
    write("config: [tiny.yaml]\ntokens: [1000]\nbaseline: a\narms: {a: {seeds: [1]}, b: {seeds: [2]}}", "first.yaml")
    found = runs("defaults: [first.yaml]\ntokens: [500]\narms: {b: {seeds: [3]}, c: {seeds: [4]}}")
    assert [(run.arm, run.tokens, run.seed) for run in found] == [("a", 500, 1), ("b", 500, 3), ("c", 500, 4)]
    assert all(run.config.model.seq_len == 10 for run in found)


def test_config_files_lie_beside_the_file_that_names_them(write, runs):
    write("config: [small.yaml]\ntokens: 1000\narms: {a: {config: [parts/a.yaml]}}", "common/first.yaml")
    write(TINY, "common/small.yaml")
    write("defaults: [more.yaml]\noptimizer: {rho: 0.25}", "common/parts/a.yaml")
    write("optimizer: {interval: 2}", "common/parts/more.yaml")
    write("optimizer: {rho: 0.75}", "own.yaml")
    first, second = runs("defaults: [common/first.yaml]\narms: {b: {config: [own.yaml]}}")
    assert (first.config.optimizer.rho, first.config.optimizer.interval) == (0.25, 2)
    assert second.config.optimizer.rho == 0.75
    assert first.config.model.seq_len == second.config.model.seq_len == 10


def test_a_grid_is_all_combinations(runs):
    found = runs(
        "config: [tiny.yaml]\ntokens: 1000\n"
        "arms: {a: {grid: {optimizer: {learning_rate: [1e-3, 1], rho: [0.5, 0.25]}, model: {use_bias: [true]}}}}"
    )
    names = ("optimizer.learning_rate", "optimizer.rho", "model.use_bias")
    wanted = [(1e-3, 0.5, True), (1e-3, 0.25, True), (1, 0.5, True), (1, 0.25, True)]
    assert [run.point for run in found] == [dict(zip(names, values, strict=True)) for values in wanted]
    configs = [run.config for run in found]
    assert [(c.optimizer.learning_rate, c.optimizer.rho, c.model.use_bias) for c in configs] == wanted


def test_a_grid_may_be_over_optimizers(runs):
    a, b = runs("config: [tiny.yaml]\ntokens: 1000\narms: {x: {grid: {optimizer: {type: [adamw, lion], b1: [0.5]}}}}")
    assert (type(a.config.optimizer), type(b.config.optimizer)) == (AdamWConfig, LionConfig)
    assert a.config.optimizer.b1 == b.config.optimizer.b1 == 0.5


@pytest.mark.parametrize(
    ("tokens", "evaluations", "steps", "every"),
    [(1000, 5, 10, 2), (1049, 5, 10, 2), (1051, 5, 11, 3), (500, 5, 5, 1), (1000, 1, 10, 10), (1e6, 4, 10_000, 2500)],
)
def test_tokens_become_steps_and_evaluations_are_spread_over_them(tokens, evaluations, steps, every, runs):
    (run,) = runs(f"config: [tiny.yaml]\ntokens: [{tokens}]\nevaluations: {evaluations}\narms: {{a: {{seeds: [7]}}}}")
    trainer = run.config.trainer
    assert (trainer.num_train_steps, trainer.evaluate_every, trainer.checkpoint_every) == (steps, every, every)
    assert (trainer.seed, trainer.run_dir, trainer.sample_tokens, trainer.keep_checkpoints) == (7, None, 0, 1)
    assert (run.tokens, run.seed) == (tokens, 7)


def test_each_length_has_its_own_schedule(runs):
    short, long = runs(
        "config: [tiny.yaml]\ntokens: [1000, 4000]\nwarmup_fraction: 0.25\nfinal_fraction: 0.5\n"
        "arms: {a: {settings: {optimizer: {learning_rate: 0.02}}}}"
    )
    assert [run.config.optimizer.warmup for run in (short, long)] == [2, 10]
    assert [run.config.optimizer.final_learning_rate for run in (short, long)] == [0.01, 0.01]


def test_the_schedule_of_a_config_file_gives_way(write, runs):
    """The file's own warm-up and final rate would not fit the study's runs, and are not asked."""
    write("optimizer: {warmup: 5000, final_learning_rate: 1e-4}\ntrainer: {num_train_steps: 3}", "train.yaml")
    (run,) = runs(
        "config: [tiny.yaml, train.yaml]\ntokens: 1000\narms: {a: {grid: {optimizer: {learning_rate: [1e-6]}}}}"
    )
    optimizer = run.config.optimizer
    assert (optimizer.warmup, optimizer.final_learning_rate) == (1, pytest.approx(5e-8))


def test_warmup_and_final_fraction_of_settings_and_grids(runs):
    found = runs(
        "config: [tiny.yaml]\ntokens: 4000\nsettings: {optimizer: {warmup: 0.5}}\narms:\n"
        "  a: {seeds: [0]}\n"
        "  b: {grid: {optimizer: {warmup: [3, 0.25], final_fraction: [0.5]}}}\n"
        "  c: {warmup_fraction: 0.2, settings: {optimizer: {final_learning_rate: 1e-5}}}\n"
    )
    rates = [run.config.optimizer.final_learning_rate / run.config.optimizer.learning_rate for run in found[:3]]
    assert [run.config.optimizer.warmup for run in found] == [20, 3, 10, 8]
    assert rates == pytest.approx([0.05, 0.5, 0.5])
    assert found[3].config.optimizer.final_learning_rate == 1e-5


def test_what_says_most_runs_first(runs):
    found = runs(
        "config: [tiny.yaml]\ntokens: [2000, 1000]\nseeds: [5, 3]\n"
        "arms: {a: {grid: {optimizer: {rho: [0.5, 0.25]}}}, b: {tokens: 1000, seeds: [3, 9]}}"
    )
    order = [(run.seed, run.tokens, run.arm, run.point.get("optimizer.rho")) for run in found]
    shortest = [(1000, "a", 0.5), (1000, "a", 0.25)]
    longest = [(2000, "a", 0.5), (2000, "a", 0.25)]
    assert order == [
        *((5, *run) for run in [*shortest, *longest]),
        *((3, *run) for run in [*shortest, (1000, "b", None), *longest]),
        (9, 1000, "b", None),
    ]


def searched(study: Study, loss: Callable[[PlannedRun], float]) -> list[PlannedRun]:
    """Plan a study until all its runs have a loss; return them in the order in which they were trained."""
    done: dict[TrainConfig, float] = {}
    trained: list[PlannedRun] = []
    while todo := [run for run in plan(study, {}, done.get) if run.config not in done]:
        done |= {run.config: loss(run) for run in todo}
        trained += todo
    return trained


SEARCH = (
    "config: [tiny.yaml]\ntokens: 1000\nseeds: [4, 5, 6]\n"
    "arms: {a: {SEARCH, grid: {optimizer: {rho: [1, 2, 4, 8, 16], b1: [0.1, 0.2, 0.3, 0.4]}}}}"
)


def bowl(run: PlannedRun) -> float:
    rho, b1 = run.point["optimizer.rho"], run.point["optimizer.b1"]
    return math.inf if rho > 8 else abs(math.log2(rho) - 3) + abs(10 * b1 - 1) + 0.5 * run.seed


def test_coordinate_descent_stops_at_the_best_point_and_adds_seeds_there(write):
    trained = searched(read_study(write(SEARCH.replace("SEARCH", "search_runs: 20"))), bowl)
    points = [(run.point["optimizer.rho"], run.point["optimizer.b1"], run.seed, run.tuning) for run in trained]
    assert points == [
        (4, 0.2, 4, True),  # the middle
        (8, 0.2, 4, True),
        (2, 0.2, 4, True),
        (8, 0.3, 4, True),  # b1 has fewer values tried than rho
        (8, 0.1, 4, True),
        (16, 0.1, 4, True),  # diverges
        (4, 0.1, 4, True),
        (8, 0.1, 5, False),
        (8, 0.1, 6, False),
    ]


@pytest.mark.parametrize(("most", "best"), [(1, (4, 0.2)), (2, (8, 0.2)), (5, (8, 0.1))])
def test_coordinate_descent_has_a_maximum_number_of_runs(most, best, write):
    trained = searched(read_study(write(SEARCH.replace("SEARCH", f"search_runs: {most}"))), bowl)
    assert [run.tuning for run in trained] == [True] * most + [False, False]
    assert all((run.point["optimizer.rho"], run.point["optimizer.b1"]) == best for run in trained[most:])


def test_a_search_over_nothing_is_a_grid_and_one_that_diverged_has_no_more_seeds(write):
    one = SEARCH.replace("SEARCH", "search_runs: 9")
    one = one.replace("[1, 2, 4, 8, 16]", "[4]").replace("[0.1, 0.2, 0.3, 0.4]", "[0.1]")
    seeds = [(run.seed, run.tuning) for run in searched(read_study(write(one)), bowl)]
    assert seeds == [(4, False), (5, False), (6, False)]
    study = read_study(write(SEARCH.replace("SEARCH", "search_runs: 20")))
    assert {run.seed for run in searched(study, lambda run: math.inf)} == {4}


def test_each_length_is_searched_and_arms_may_differ(write):
    text = SEARCH.replace("SEARCH", "search_runs: 3").replace("tokens: 1000", "tokens: [1000, 2000]")
    study = read_study(
        write(f"{text.removesuffix('}')}, b: {{search_runs: null, grid: {{optimizer: {{rho: [1, 2]}}}}}}}}")
    )
    trained = searched(
        study, lambda run: 1.0 if run.arm == "b" else bowl(run) + (run.tokens == 2000) * run.point["optimizer.rho"]
    )
    assert [(run.arm, run.tokens) for run in trained].count(("b", 2000)) == 6
    best = {run.tokens: run.point["optimizer.rho"] for run in trained if run.arm == "a" and not run.tuning}
    assert best == {1000: 8, 2000: 2}


GOOD = "config: [tiny.yaml]\ntokens: 1000\n"
ARM = "arms: {a: {settings: {optimizer: {type: adamw}}}}\n"


def study_of(arm: str) -> str:
    return f"{GOOD}arms: {{a: {arm}}}"


BAD = {
    "no arms": (GOOD, "FILE: arms is missing"),
    "empty arms": (f"{GOOD}arms: {{}}", "FILE: arms is missing"),
    "arms is a list": (f"{GOOD}arms: [a]", "FILE: arms is a list; it must be a mapping"),
    "empty arm": (study_of(""), "FILE: arms.a must be a mapping"),
    "no tokens": (f"config: [tiny.yaml]\n{ARM}", "FILE: tokens is missing"),
    "unknown key": (
        f"{GOOD}{ARM}token: 5",
        "FILE: unknown key 'token'; valid fields are config, settings, search_runs",
    ),
    "unknown key in an arm": (study_of("{gird: {}}"), "FILE: unknown key 'arms.a.gird'; valid fields are"),
    "a grid of all arms": (f"{GOOD}{ARM}grid: {{optimizer: {{b1: [1]}}}}", "FILE: unknown key 'grid.optimizer.b1'"),
    "a run's configuration": ("model: {seq_len: 8}", "FILE: unknown key 'model.seq_len'"),
    "key in a list field": (f"{GOOD}{ARM}seeds: {{a: 1}}", "FILE: unknown key 'seeds.a'"),
    "an arm's grid is a list": (study_of("{grid: [1]}"), "FILE: arms.a.grid is a list; it must be a mapping"),
    "grid value is no list": (
        study_of("{grid: {optimizer: {rho: 0.1}}}"),
        "FILE: arms.a.grid.optimizer.rho is 0.1; it must be a list of values",
    ),
    "empty grid": (study_of("{grid: {optimizer: {rho: []}}}"), "FILE: arms.a.grid.optimizer.rho is "),
    "grid field of another optimizer": (
        study_of("{settings: {optimizer: {type: adamw}}, grid: {optimizer: {rho: [1]}}}"),
        "arm a: FILE: unknown key 'optimizer.rho'; valid fields for optimizer (type adamw) are",
    ),
    "setting out of range": (
        study_of("{settings: {optimizer: {rho: -1}}}"),
        "arm a: optimizer.rho is -1.0; it must be above 0",
    ),
    "config is a string": (
        "config: tiny.yaml\ntokens: 1\n" + ARM,
        "FILE: config is 'tiny.yaml'; it must be a list of file",
    ),
    "config holds a number": (
        "config: [3]\ntokens: 1\n" + ARM,
        "FILE: config is a list; it must be a list of file names",
    ),
    "config is not there": (
        "config: [nowhere.yaml]\ntokens: 1\n" + ARM,
        "FILE: config: DIR/nowhere.yaml: file not found",
    ),
    "baseline is no arm": (f"{GOOD}{ARM}baseline: b", "FILE: baseline is 'b'; it must be one of the arms a"),
    "baseline is a list": (f"{GOOD}{ARM}baseline: [a]", "FILE: baseline is a list; it must be one of the arms a"),
    "half tokens": (
        f"config: [tiny.yaml]\n{ARM}tokens: [1.5]",
        "FILE: tokens contains 1.5; it must be a list of integers",
    ),
    "true tokens": (f"config: [tiny.yaml]\n{ARM}tokens: [true]", "FILE: tokens contains true; it must be"),
    "negative tokens": (f"config: [tiny.yaml]\n{ARM}tokens: [-5]", "FILE: tokens contains -5; it must be at least 1"),
    "too few tokens": (
        f"config: [tiny.yaml]\n{ARM}tokens: 449\nevaluations: 5",
        "arm a: tokens is 449, which is 4 steps; use at least one step for each of the 5 evaluations",
    ),
    "a seed twice": (f"{GOOD}{ARM}seeds: [1, 2, 1]", "FILE: seeds is [1, 2, 1]; it must not contain duplicates"),
    "no seeds": (f"{GOOD}{ARM}seeds: []", "FILE: seeds is an empty list"),
    "no evaluations": (f"{GOOD}{ARM}evaluations: 0", "FILE: evaluations is 0; it must be at least 1"),
    "no search runs": (f"{GOOD}{ARM}search_runs: 0", "FILE: search_runs is 0; it must be at least 1"),
    "several search runs": (study_of("{search_runs: [5]}"), "FILE: search_runs is a list; it must be an integer"),
    "half a search run": (study_of("{search_runs: 2.5}"), "FILE: search_runs is 2.5; it must be an integer"),
    "a search in no order": (
        study_of("{search_runs: 5, grid: {optimizer: {b1: [0.9, 0.5, 0.8]}}}"),
        "FILE: arms.a.grid.optimizer.b1 is not in order; with search_runs, list numbers in ascending or descending",
    ),
    "a value twice": (
        study_of("{grid: {optimizer: {b1: [0.9, 0.5, 0.9]}}}"),
        "FILE: arms.a.grid.optimizer.b1 contains duplicates; list each value once",
    ),
    "a value that the search may never reach": (
        study_of("{search_runs: 1, grid: {optimizer: {b1: [0.5, 0.9, 2]}}}"),
        "arm a: optimizer.b1 is 2.0; it must be in [0, 1)",
    ),
    "evaluations is a list": (f"{GOOD}{ARM}evaluations: [5]", "FILE: evaluations is a list; it must be an integer"),
    "warm-up of more than all": (
        f"{GOOD}{ARM}warmup_fraction: 1.5",
        "FILE: warmup_fraction is 1.5; it must be between",
    ),
    "true fraction": (f"{GOOD}{ARM}final_fraction: true", "FILE: final_fraction is true; it must be between"),
    "steps": (
        f"{GOOD}{ARM}settings: {{trainer: {{num_train_steps: 9}}}}",
        "FILE: settings.trainer.num_train_steps has no effect in a study; use tokens instead",
    ),
    "seeds in a grid": (
        study_of("{grid: {trainer: {seed: [1, 2]}}}"),
        "FILE: arms.a.grid.trainer.seed has no effect in a study; use seeds instead",
    ),
    "evaluations of an arm": (
        study_of("{settings: {trainer: {evaluate_every: 9}}}"),
        "FILE: arms.a.settings.trainer.evaluate_every has no effect in a study; use evaluations instead",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, runs, tmp_path):
    text, wanted = BAD[name]
    with pytest.raises(InputError) as caught:
        runs(text)
    message = str(caught.value)
    assert "\n" not in message
    assert wanted.replace("FILE", str(tmp_path / "study.yaml")).replace("DIR", str(tmp_path)) in message


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("optimizer.roh", "1", "arm a: unknown option '--optimizer.roh'"),
        ("optimizer.b1", "2", "arm a: optimizer.b1 is 2.0; it must be in [0, 1)"),
        ("trainer.num_train_steps", "5", "--trainer.num_train_steps has no effect in a study; use tokens instead"),
        ("trainer.run_dir", "x", "--trainer.run_dir has no effect in a study; use --out instead"),
    ],
)
def test_a_bad_override_is_one_line(field, value, wanted, runs):
    with pytest.raises(InputError) as caught:
        runs(GOOD + ARM, **{field.replace(".", "__"): value})
    assert str(caught.value).startswith(wanted) and "\n" not in str(caught.value)


def test_a_field_of_the_grid_cannot_be_overridden(runs):
    with pytest.raises(InputError, match=r"^arm a: --optimizer\.rho overrides a field of the grid; remove it from one"):
        runs("tokens: 1000\narms: {a: {grid: {optimizer: {rho: [1, 2]}}}}", optimizer__rho="3")


def marked(path):
    """Those of the evidence are done, and planned again in the nightly tests."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if "evidence" in path.parts else [])


@pytest.mark.parametrize("path", map(marked, STUDIES))
def test_the_studies_of_the_project(path, plugin_folder):
    """Each can be planned, and the records beside the evidence are of its runs."""
    runs, file = plan(read_study(path), {}), ROOT / "docs" / "evidence" / path.stem / "study.json"
    records = read_records(file) if file.exists() else []
    assert runs and (not records or any(find(records, run.config) for run in runs))
