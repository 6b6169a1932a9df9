import io
import math

import pytest

from atoll.errors import InvalidArgument
from atoll.history import Record
from atoll.report import progress_for
from atoll.report.live import line_for
from atoll.report.numbers import amount, headline, rate, signed, size, span


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_line_has_round_loss_metric_time_and_rate():
    record = Record(12, 4, {"loss": 0.413}, test={"loss": 0.4, "accuracy": 0.812}, seconds={"train": 0.9})
    assert line_for(record, 50, 3.1) == "round 12/50  loss 0.413  test accuracy 0.812  0.90 s  3.1 rounds/s"


def test_line_of_a_round_that_refused_somebody():
    record = Record(2, 4, {"loss": 0.5}, refused={"c1": {"reason": "too long"}}, refusals=3)
    assert line_for(record, 5, 0.0) == "round 2/5  loss 0.500  3 refused  0 µs"


def test_line_of_a_round_that_was_not_evaluated():
    assert line_for(Record(1, 4, {"loss": math.nan}, seconds={"train": 0.02}), 5, 0.0) == "round 1/5  loss –  20 ms"


@pytest.mark.parametrize("progress", ["auto", True])
def test_one_line_for_each_round_without_a_terminal(progress, history, capsys):
    with progress_for(progress, 3, 0, "x") as show:
        for record in history(3):
            show(record)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split()[1] for line in captured.err.splitlines()] == ["1/3", "2/3", "3/3"]


def test_false_shows_nothing(history, capsys):
    with progress_for(False, 3, 0, "x") as show:
        show(history(1)[0])
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_fast_rounds_do_not_redraw(history, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_for("auto", 2000, 0, "[red]heart[/red]") as show:
        for record in history(2000):
            show(record)
    text = terminal.getvalue()
    assert "[red]heart[/red]" in text
    assert "2000/2000" in text
    assert "accuracy" in text
    assert text.count("\r") + text.count("\n") < 400


def test_a_dumb_terminal_gets_lines(history, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_for("auto", 1, 0, "") as show:
        show(history(1)[0])
    assert terminal.getvalue().startswith("round 1/1  loss")


def test_the_bar_goes_away_with_an_error(history, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(KeyError), progress_for(True, 5, 0, "") as show:
        show(history(1)[0])
        raise KeyError("stop")


def test_an_unknown_progress_is_refused():
    with pytest.raises(InvalidArgument, match="progress='yes'"), progress_for("yes", 1, 0, ""):  # type: ignore[arg-type]
        pass


def test_numbers_read_well():
    assert [amount(v) for v in (0.8124, 0.0, -0.5, 12.3456, 2e-5, 1e28, math.nan, None)] == [
        "0.812", "0.000", "-0.500", "12.346", "2.00e-05", "1.00e+28", "–", "–",
    ]  # fmt: skip
    assert [span(v) for v in (0.0000213, 0.0213, 0.42, 3.21, 61, 200, 7500, math.nan)] == [
        "21 µs", "21.3 ms", "0.42 s", "3.2 s", "61 s", "3 min 20 s", "2 h 05 min", "–",
    ]  # fmt: skip
    assert [size(v) for v in (0, 999, 12_345, 999_700, 3.2e9)] == ["0 B", "999 B", "12.3 kB", "1 MB", "3.2 GB"]
    assert [rate(v) for v in (0.0, 0.1, 3.14, 250.0)] == ["–", "10 s/round", "3.1 rounds/s", "250 rounds/s"]
    assert signed(-0.0213) == "−0.021"
    assert signed(0.0213) == "+0.021"


def test_the_headline_is_the_first_metric_of_the_models_clients_use(history):
    assert headline(history(1)[0])[:2] == ("test", "accuracy")
    assert headline(history(1, personal=True)[0])[:2] == ("personal", "accuracy")
    assert headline(Record(1, 1, {"loss": 1.0}, validation={"loss": 0.5})) == ("validation", "loss", 0.5)
    assert headline(Record(1, 1, {"loss": 1.0})) is None
