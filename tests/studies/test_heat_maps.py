"""Heat maps of the statistics of arrays: which numbers are where, and the page that has them."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sophia_levanter.studies.comparability import compare
from sophia_levanter.studies.heat_maps import CAPTION, MOST_COLUMNS, heat_map_png, statistics_of
from sophia_levanter.studies.page import write_page
from sophia_levanter.studies.runs import read_run
from tiny_runs import step_lines, write_run

NAN = np.nan


def measured(step, layers=11):
    """What a run logs of an array in a stack and of one beside it."""
    places = [*(f"blocks/w/{layer}" for layer in range(layers)), "wte"]
    numbers = {f"{place}/weight_rms": i + step / 100 for i, place in enumerate(places)}
    numbers |= {f"{place}/win_rate": 0.0 for place in places} | {"wte/update_ratio": None, "wte/update_rms": 3.0}
    return {f"statistics/{name}": value for name, value in numbers.items()}


def run_of(path, steps, every):
    lines = [line | (measured(line["step"]) if line["step"] % every == 0 else {}) for line in step_lines(steps)]
    return read_run("a", write_run(path, lines=lines))


def test_a_row_is_a_layer_and_a_column_a_step(tmp_path):
    found = statistics_of(run_of(tmp_path, 9, 4))
    assert found.layers == {"blocks/w": list(range(11)), "wte": [None]}
    assert found.steps.tolist() == [0, 4, 8]
    assert list(found.grids) == ["weight_rms", "win_rate"]  # of the others there is no number, or none to show
    wanted = np.arange(12)[:, None] + np.array([0, 0.04, 0.08])
    np.testing.assert_array_equal(found.grids["weight_rms"][1:], wanted[1:])
    # A logarithmic scale has no place for 0; the win rate's is not logarithmic.
    np.testing.assert_array_equal(found.grids["weight_rms"][0], [NAN, 0.04, 0.08])
    assert not found.grids["win_rate"].any()
    assert len(found.edges) == 13 and (np.diff(found.edges) > 0).all()
    assert found.bounds.tolist() == [0, found.edges[11], found.edges[12]]


def test_a_run_that_an_older_version_began_has_each_array_once(tmp_path):
    """The older version joined the parts of an array's path with dots."""
    lines = [line | measured(line["step"]) for line in step_lines(4)]
    older = [{name.replace("blocks/w", "blocks.w"): value for name, value in line.items()} for line in lines[:2]]
    found = statistics_of(read_run("a", write_run(tmp_path, lines=[*older, *lines[2:]])))
    assert found.layers == {"blocks/w": list(range(11)), "wte": [None]}
    assert found.steps.tolist() == [0, 1, 2, 3]
    wanted = np.arange(1, 12)[:, None] + np.array([0, 0.01, 0.02, 0.03])
    np.testing.assert_array_equal(found.grids["weight_rms"][1:], wanted)


def test_runs_without_numbers_have_none(tmp_path):
    lines = [line | {"statistics/wte/weight_rms": None} for line in step_lines(1)]
    for name, given in (("a", step_lines(1)), ("b", lines)):
        assert statistics_of(read_run(name, write_run(tmp_path / name, lines=given))) is None


def test_long_runs_are_thinned_out(tmp_path):
    found = statistics_of(run_of(tmp_path, 2 * MOST_COLUMNS + 1, 1))
    assert found.steps.tolist() == list(range(0, 2 * MOST_COLUMNS + 1, 3))
    assert found.grids["weight_rms"].shape == (12, len(found.steps))


@pytest.mark.parametrize("steps", [1, 9])
def test_the_picture_has_the_colours(steps, tmp_path):
    (tmp_path / "a.png").write_bytes(heat_map_png(statistics_of(run_of(tmp_path, steps, 4)), "a"))
    pixels = imread(tmp_path / "a.png")[..., :3]
    # viridis from its dark to its light end, and grey for what is not there
    for colour, least in ((0x440154, 5000), (0xFDE725, 500), (0xD9D9D9, 500)):
        wanted = np.array([colour >> 16, colour >> 8 & 255, colour & 255]) / 255
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.02).sum() > least, hex(colour)


def test_a_png_has_the_name_of_the_run_and_the_caption(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    heat_map_png(statistics_of(run_of(tmp_path, 9, 4)), "my run")
    (figure,) = figures
    assert figure.get_suptitle() == "my run: arrays and layers"
    assert figure.get_supxlabel().replace("\n", " ") == CAPTION
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Weight RMS", "", "Win rate", ""]  # each with its colour bar


def test_a_page_has_those_of_the_runs_that_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("sophia_levanter.studies.page.png", lambda *_: b"")
    monkeypatch.setattr("sophia_levanter.studies.page.svg", lambda *_: "data:")
    monkeypatch.setattr("sophia_levanter.studies.page.heat_map_png", lambda *_: b"heat map")
    runs = [run_of(tmp_path / "a", 9, 4), read_run("b", write_run(tmp_path / "b"))]
    page = tmp_path / "r.html"
    files = {path.name for path in write_page(runs, compare(runs), page)}
    assert {name for name in files if "statistics" in name} == {"r-statistics-1.png"}
    assert not [name for name in files if "metric" in name]
    assert page.read_text().count("<h2>Arrays and layers</h2>") == 1
    assert page.read_text().count('alt="Array statistics against steps: a"') == 1
    assert "against steps: b" not in page.read_text().partition("Arrays and layers")[2]
    files = {path.name for path in write_page(runs[:1], compare(runs[:1]), page)}
    assert "r-statistics.png" in files
    write_page(runs[1:], compare(runs[1:]), page)
    assert "Arrays and layers" not in page.read_text()
