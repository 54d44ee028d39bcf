"""Series for pictures: thin, smooth, within limits; and the panels of registered metrics."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from sophia_levanter.studies import plots
from sophia_levanter.studies.panels import AXES, STEPS, VALIDATION, WIN_RATE, curves_of, other_panels
from sophia_levanter.studies.plots import _draw, limits, png, smooth, spans_decades, study_pictures, svg, thin
from sophia_levanter.studies.runs import read_run
from tiny_runs import step_lines, write_run

NAN = np.nan


@pytest.mark.parametrize(("axis", "x"), [(STEPS, [5, 10]), (AXES[1], [250, 500])], ids=["steps", "tokens"])
def test_a_curve_is_drawn_against_its_axis(axis, x, tmp_path):
    run = read_run("a", write_run(tmp_path))
    axes = Figure().subplots()
    _draw(axes, VALIDATION, [run], axis)
    (line,) = axes.get_lines()
    assert line.get_xdata().tolist() == x
    assert line.get_ydata().tolist() == run.series["validation/loss"].values.tolist() == [4.2, 4.1]


def test_an_arm_has_one_style_in_all_pictures(make_cell, monkeypatch):
    """One of which no run has finished is in the picture of the final losses alone, and comes last."""
    legends = []
    monkeypatch.setattr(plots, "as_png", lambda figure, samples: legends.append(samples) or b"")
    study_pictures([make_cell("lost", 100, [None]), make_cell("a", 100, [2.0]), make_cell("b", 100, [3.0])])
    styles = [
        {sample.get_label(): (sample.get_color(), sample.get_marker()) for sample in legend} for legend in legends
    ]
    a, b, lost = zip(plots.COLOURS, plots.MARKERS[:3], strict=False)
    assert styles == [{"a": a, "b": b, "lost": lost}, {"a": a, "b": b}]


def test_few_points_stay():
    bins = thin(np.array([1, 2, 3]), np.array([5.0, NAN, 4.0]), most=3)
    assert bins.x.tolist() == [1, 2, 3] and bins.low is bins.high
    np.testing.assert_array_equal(bins.mean, [5, NAN, 4])


def test_many_points_become_means_of_their_neighbours():
    values = np.array([1.0, 3.0, NAN, 5.0, NAN, NAN, 7.0, 9.0])
    bins = thin(np.arange(8), values, most=4)
    assert bins.x.tolist() == [0.5, 2.5, 4.5, 6.5]
    np.testing.assert_array_equal(bins.mean, [2, 5, NAN, 8])
    np.testing.assert_array_equal(bins.low, [1, 5, NAN, 7])
    np.testing.assert_array_equal(bins.high, [3, 5, NAN, 9])


def test_a_million_points_are_two_thousand():
    x = np.arange(1_000_003)
    bins = thin(x, x.astype(float))
    assert len(bins.x) == 2000 and bins.low[0] == 0 and bins.high[-1] == x[-1]


def test_smoothing_takes_means_and_keeps_gaps():
    values = np.tile([1.0, 3.0], 50)
    values[10] = NAN
    smoothed = smooth(values)
    assert np.isnan(smoothed[10]) and np.isfinite(np.delete(smoothed, 10)).all()
    assert smoothed[50] == pytest.approx(np.mean(values[48:53]))
    assert smoothed[0] == pytest.approx(np.mean(values[:3]))
    assert smooth(np.array([4.0])).tolist() == [4.0]


def curve(end: float, start: float = 10.0) -> np.ndarray:
    return end + (start - end) * np.exp(-np.arange(100) / 5)


def test_the_first_steps_do_not_set_the_limits():
    low, high = limits([curve(3.0)])
    assert 2.7 < low < 3.0 and 3.3 < high < 5.0


def test_a_curve_that_flies_off_does_not_set_the_limits():
    low, high = limits([curve(3.0), curve(3.1), np.append(curve(3.0)[:50], np.full(50, 1e6))])
    assert low > 2.7 and high < 5.0


def test_a_worse_curve_is_seen():
    assert limits([curve(3.0), curve(3.1), curve(6.0)])[1] > 6.0


def test_limits_of_little():
    assert limits([np.array([NAN])]) is None
    assert limits([]) is None
    for only in (2.0, 0.0, -1.0):
        low, high = limits([np.array([only])])
        assert low < only < high


def test_decades():
    assert spans_decades([np.array([1e-3, 1.0]), np.array([NAN])])
    assert not spans_decades([np.array([0.5, 1.0])])
    assert not spans_decades([np.array([0.0, 1.0])])
    assert not spans_decades([np.array([NAN])])


def test_a_registered_metric_has_a_panel_with_all_its_curves(tmp_path):
    own = {"norms/layer_0": 1.0, "norms/layer_1": 2.0, "one/x": None, "a b/c": 1.0, "alone": 1.0}
    lines = [line | own if "train/loss" in line else line for line in step_lines(4)]
    runs = [read_run("with", write_run(tmp_path / "a", lines=lines)), read_run("without", write_run(tmp_path / "b"))]
    added = [panel for panel in other_panels(runs) if panel not in other_panels(runs[1:])]
    assert [(panel.key, panel.title, panel.caption) for panel in added] == [
        ("metric-norms", "norms", "From lightest to darkest: layer_0, layer_1.")
    ]
    assert [series.last for series in curves_of(added[0], runs[0])] == [1, 2]
    assert curves_of(added[0], runs[1]) == []
    assert svg(added[0], runs, STEPS).startswith("data:image/svg+xml")


def test_named_sets_and_tasks_have_panels(tmp_path):
    numbers = {f"validation/{name}/{key}": 3.0 for name in ("books", "code") for key in ("loss", "bits_per_byte")}
    numbers |= {"tasks/piqa/accuracy": 0.5, "tasks/piqa/accuracy_interval": 0.1, "tasks/piqa/normalized_accuracy": 0.6}
    lines = [line | numbers if "validation/loss" in line else line for line in step_lines(10)]
    runs = [read_run("with", write_run(tmp_path / "a", lines=lines)), read_run("without", write_run(tmp_path / "b"))]
    added = [panel for panel in other_panels(runs) if panel not in other_panels(runs[1:])]
    assert {panel.key: panel.caption.partition(" From ")[2] for panel in added} == {
        "validation_sets": "lightest to darkest: books, code.",
        "validation_sets_bits": "lightest to darkest: books, code.",
        "tasks": "lightest to darkest: piqa/accuracy, piqa/normalized_accuracy.",
    }
    assert [len(curves_of(panel, runs[0])) for panel in added] == [2, 2, 2]


@pytest.fixture
def figures(monkeypatch):
    """The figures of the PNGs, which are not drawn."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


def legend_of(figure):
    """The opacity of each line of a legend, by its name."""
    (legend,) = figure.legends
    return {text.get_text(): line.get_alpha() for text, line in zip(legend.texts, legend.legend_handles, strict=True)}


def test_a_png_of_named_sets_stands_by_itself(tmp_path, figures):
    """It has a title, and a legend of the sets, each with one opacity in all runs."""
    lines = [line | {"validation/code/loss": 3.0} if "validation/loss" in line else line for line in step_lines(10)]
    more = [line | {"validation/books/loss": 2.0} if "validation/loss" in line else line for line in lines]
    both = read_run("both", write_run(tmp_path / "a", lines=more))
    code = read_run("code alone", write_run(tmp_path / "b", lines=lines))
    (panel,) = [panel for panel in other_panels([both]) if panel.key == "validation_sets"]
    png([(panel, STEPS)], [both])
    png([(panel, STEPS)], [both, code])
    (alone, together) = figures
    (axes,) = alone.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (panel.title, "steps", panel.label)
    assert legend_of(alone) == {"code": 0.25, "books": 1.0}
    assert legend_of(together) == {"both": None, "code alone": None, "code": 0.25, "books": 1.0}
    assert [line.get_alpha() for line in together.axes[0].get_lines()] == [0.25, 1.0, 0.25]


def test_a_png_of_one_curve_needs_no_legend(tmp_path, figures):
    run = read_run("a", write_run(tmp_path))
    png([(VALIDATION, STEPS), (WIN_RATE, STEPS)], [run])
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["Validation loss", "Win rate"]
    assert [*legend_of(figure)] == ["recommended range"]
