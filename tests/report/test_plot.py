import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from atoll.errors import InvalidArgument
from atoll.history import Record
from atoll.report import plot_client_panels, plot_clients, plot_comparison, plot_history
from atoll.report.plot import history_panels, thinned


def labels(axes):
    return [line.get_label() for line in axes.get_lines()]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_history_is_saved_in_each_format(suffix, history, tmp_path):
    path = tmp_path / "deep" / f"run{suffix}"
    plot_history(history(5), path, title="A $ign & <tag>")
    assert path.stat().st_size > 1000


def test_a_history_has_losses_metrics_and_bytes(history):
    figure = plot_history(history(30, personal=True))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss", "Accuracy", "Bytes sent, all rounds so far"]
    assert labels(figure.axes[0]) == ["training", "test, global model", "test, personal models"]
    assert len(figure.axes[1].collections) == 1  # the band


def test_rounds_that_were_not_evaluated_are_bridged(history):
    figure = plot_history(history(20, every=5))
    (line,) = figure.axes[1].get_lines()
    assert list(line.get_xdata()) == [5, 10, 15, 20]


def test_bytes_add_up(history):
    figure = plot_history(history(4))
    up, down = figure.axes[2].get_lines()
    assert list(up.get_ydata()) == [1.2, 2.4, 3.6, pytest.approx(4.8)]
    assert down.get_ydata()[-1] == pytest.approx(9.6)
    assert figure.axes[2].get_ylabel() == "kB"


def test_nothing_is_drawn_that_is_not_there():
    panels = history_panels([Record(1, 0, {"loss": math.nan})])
    assert [p.title for p in panels] == ["Loss"]
    plot_history([Record(1, 0, {"loss": math.nan})])


def test_epsilon_has_a_panel(history):
    private = [replace(r, epsilon=0.1 * r.round) for r in history(3)]
    assert [p.title for p in history_panels(private)][-1] == "Privacy spent (epsilon)"


def test_an_empty_history_is_refused():
    with pytest.raises(InvalidArgument, match="history is empty"):
        plot_history([])


def test_another_suffix_is_refused(history, tmp_path):
    with pytest.raises(InvalidArgument, match=r"\.svg, \.png or \.pdf"):
        plot_history(history(2), tmp_path / "run.gif")


def test_thinning_keeps_ends_and_extremes():
    values = [math.sin(i / 50) for i in range(10_000)]
    values[1234] = 7.0
    values[4321] = -7.0
    kept = thinned(values)
    assert len(kept) <= 402
    assert {0, 1234, 4321, 9999} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned([1.0, 2.0]) == [0, 1]


def test_comparison_takes_personal_models_where_there_are_some(history):
    named = {"shared": history(3), "own": history(3, personal=True)}
    shared, own = plot_comparison(named, "accuracy").axes[0].get_lines()
    assert own.get_ydata()[-1] == pytest.approx(shared.get_ydata()[-1] + 0.03)
    plot_comparison(named, "test_accuracy_worst_decile")
    with pytest.raises(InvalidArgument, match=r"metric='acuracy' is unknown.*Did you mean 'accuracy'"):
        plot_comparison(named, "acuracy")


def test_clients_with_and_without_intervals(tmp_path):
    table = {
        "A$b$c": {"alone": (0.8, 0.7, 0.9), "federated": 0.85},
        "<b>": {"alone": (0.6, math.nan, math.nan), "federated": math.nan},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_clients(table, tmp_path / "clients.svg", metric="auc")
    text = (tmp_path / "clients.svg").read_text()
    assert "<b>" not in text
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == [r"A\$b\$c", "<b>"]
    assert figure.axes[0].get_xlabel() == "AUC"
    assert len(plot_client_panels({"auc": table, "accuracy": table}).axes) == 2
    with pytest.raises(InvalidArgument, match="at least one client"):
        plot_clients({})


def test_no_window_system_is_touched():
    code = (
        "import sys\nfrom atoll.history import Record\nfrom atoll.report import plot_history\n"
        "plot_history([Record(1, 2, {'loss': 1.0}), Record(2, 2, {'loss': 0.5})])\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib.pyplot" not in done.stdout.split()
