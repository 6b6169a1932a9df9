import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import atoll
from atoll.errors import InvalidArgument, RunError
from atoll.journal import open_journal
from atoll.report import read_run, report_run, write_comparison, write_report
from atoll.report.html import call

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Collects elements, and text outside of styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def experiment(title="A run", clients=("a", EVIL), algorithm=atoll.fedavg, **more):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    data = atoll.FederatedDataset.from_arrays(dict.fromkeys(clients, (x, y)), test=0.3, seed=0)
    model = atoll.Model(nn.Linear(3, 1), loss="binary_cross_entropy", metrics=("accuracy", "auc"))
    return atoll.Experiment(
        model=model, data=data, algorithm=algorithm(atoll.local_sgd(lr=0.1)), rounds=3, title=title,
        initial=model.init(0), **more,
    )  # fmt: skip


def written(path):
    return Page(path.read_text(encoding="utf-8"))


def self_contained(page):
    assert "script" not in page.tags
    assert page.links == []
    assert "img" not in page.tags and "link" not in page.tags and "iframe" not in page.tags


def test_a_result_without_a_directory(tmp_path):
    result = experiment().simulate(progress=False)
    page = written(result.report(tmp_path / "report.html"))
    self_contained(page)
    assert "No differential privacy was used." in page.text
    assert "fedavg(local_sgd(lr=0.1, epochs=1, batch_size=32))" in page.text
    assert "vectorized" in page.text
    assert page.tags.count("svg") == 6  # loss, two metrics, bytes, two metrics of clients


def test_nothing_that_a_user_names_becomes_markup(tmp_path):
    result = experiment(title=EVIL).simulate(progress=False, directory=tmp_path / "run")
    path = result.report(tmp_path / "report.html")
    self_contained(written(path))
    assert "<script" not in path.read_text().lower()
    assert EVIL in written(path).text  # it is shown, as text
    other = read_run(tmp_path / "run")
    path = write_comparison({EVIL: other, "b": other}, {"b": [EVIL]}, tmp_path / "compare.html")
    self_contained(written(path))
    assert "<script" not in path.read_text().lower()


def test_a_loaded_result_without_its_model(tmp_path):
    experiment(algorithm=atoll.local_only).simulate(progress=False, directory=tmp_path / "run")
    loaded = atoll.Result.load(tmp_path / "run")
    page = written(write_report(loaded, tmp_path / "report.html"))
    assert "own model" in page.text
    assert "finished" in page.text
    assert re.search(r"torch 2\.", page.text)


def test_an_interrupted_run(tmp_path):
    def stop(record):
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment().simulate(progress=False, directory=tmp_path / "run", callbacks=[stop])
    run = read_run(tmp_path / "run")
    assert run.state == "unfinished"
    assert len(run.history) == 2
    page = written(report_run(tmp_path / "run", tmp_path / "deep" / "report.html"))
    assert "unfinished" in page.text
    assert "Each client" not in page.text


def test_states_of_a_run(tmp_path):
    from atoll.journal import locked

    folder = tmp_path / "run"
    experiment().simulate(progress=False, directory=folder)
    assert read_run(folder).state == "finished"
    journal = open_journal(folder)
    for kind, state in (("resumed", "unfinished"), ("interrupted", "interrupted"), ("failed", "failed")):
        journal.append(kind, {"round": 3, "error": "round 4: too high a rate"})
        assert read_run(folder).state == state
    assert "too high a rate" in written(report_run(folder, tmp_path / "x.html")).text
    journal.append("resumed", {"round": 3})
    journal.close()
    with locked(folder):
        assert read_run(folder).state == "running"


def test_a_long_history_of_many_clients_stays_small(history, tmp_path):
    result = experiment().simulate(progress=False)
    result.history = history(10_000)
    result.clients = {"global": {f"client {i}": {"loss": 0.1, "accuracy": i / 5000} for i in range(5000)}}
    path = write_report(result, tmp_path / "report.html")
    assert path.stat().st_size < 2_000_000
    page = written(path)
    assert "Of 5,000 clients, the 100 with the lowest and the 100 with the highest accuracy are listed." in page.text
    assert "10,000" in page.text


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        report_run(tmp_path / "none", tmp_path / "x.html")
    with pytest.raises(RunError, match="not a run directory"):
        report_run(tmp_path, tmp_path / "x.html")
    result = experiment().simulate(progress=False)
    result.history = []
    with pytest.raises(InvalidArgument, match="no finished round"):
        write_report(result, tmp_path / "x.html")
    folder = result.save(tmp_path / "saved")
    (folder / "result.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        read_run(folder)
    assert not (tmp_path / "x.html").exists()


def test_a_metric_that_is_undefined_is_a_dash_with_the_reason(tmp_path):
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.ones(20, dtype=torch.int64)
    data = atoll.FederatedDataset.from_arrays({"ill": (x, y), "mixed": (x, y * (x[:, 0] > 0))}, test=0.5)
    model = atoll.Model(nn.Linear(3, 1), loss="binary_cross_entropy", metrics=("auc",))
    result = atoll.simulate(model, data, algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1)), rounds=2, progress=False)
    page = written(result.report(tmp_path / "report.html"))
    assert "auc is undefined at 1 client(s) (ill)" in page.text
    assert "–" in page.text


def test_a_spec_reads_as_a_call():
    plan = {"name": "local_sgd", "lr": 0.1, "epochs": None, "steps": 5, "momentum": 0.0, "shuffle": True}
    server = {"name": "sgd", "lr": 1.0, "momentum": 0.0}
    assert call({"name": "fedavg", "plan": plan, "server": server}) == "fedavg(local_sgd(lr=0.1, steps=5))"
    adam = {"name": "adam", "lr": 0.01}
    assert call({"name": "fedadam", "plan": plan, "server": adam}).endswith("server=adam(lr=0.01))")
    assert call({"name": "everyone"}) == "everyone"
    assert call(None) == ""


def test_the_specification_is_there_in_full(tmp_path):
    result = experiment().simulate(progress=False)
    path = result.report(tmp_path / "report.html")
    text = written(path).text
    assert json.loads(text[text.index('{ "title"') : text.rindex("}") + 1]) == result.spec
