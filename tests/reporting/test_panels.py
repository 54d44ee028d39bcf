from sophia_levanter.reporting.axes import STEPS
from sophia_levanter.reporting.figures import svg
from sophia_levanter.reporting.panels import curves_of, other_panels
from sophia_levanter.reporting.runs import read_run
from written_runs import step_lines, write_run


def test_a_registered_metric_has_a_panel_with_all_its_curves(tmp_path):
    own = {"norms/layer_0": 1.0, "norms/layer_1": 2.0, "one/x": None, "a b/c": 1.0, "alone": 1.0}
    lines = [line | own if "train/loss" in line else line for line in step_lines(4)]
    runs = [read_run("with", write_run(tmp_path / "a", lines=lines)), read_run("without", write_run(tmp_path / "b"))]
    added = [panel for panel in other_panels(runs) if panel not in other_panels(runs[1:])]
    assert [(panel.key, panel.title, panel.caption) for panel in added] == [
        ("metric-norms", "norms", "From faint to strong: layer_0, layer_1.")
    ]
    assert [series.last for series in curves_of(added[0], runs[0])] == [1, 2]
    assert curves_of(added[0], runs[1]) == []
    assert svg(added[0], runs, STEPS).startswith("data:image/svg+xml")
